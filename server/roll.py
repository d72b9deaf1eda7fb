"""Who takes part: every node is asked who it is, and asked again until all are there or it is time to begin.

Nobody is lost in silence: whoever is not known is absent, and asked again before the next round, or refused,
and named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from soppu.errors import FederationError, RegistryError
from soppu.registry import check_user_id

_ATTEMPTS = 3  # how often a node is asked before the first round
_PAUSE_S = 0.5
_NO_ANSWER = "no answer"


class Roll:
    """The roll of a federation. `nodes` is what is known by now; it grows when somebody joins.

    Args:
        order: what a node is told with the question.
        plan_hash: of the layer plan a node has to hold.
        users: everybody who is expected; empty where any node may come.
        most_examples: how many a user may say to have.

    Attributes:
        nodes: node id -> user, of those who take part.
        examples: user -> how many examples they said to train on.
        refused: user or node -> why they cannot take part; they are not asked again.
        silent: node -> why it is not known yet; it is asked again.
    """

    def __init__(
        self, grid: Grid, order: ConfigRecord, *, plan_hash: str, users: Sequence[str], most_examples: int
    ) -> None:
        self.nodes: dict[int, str] = {}
        self.examples: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.silent: dict[int, str] = {}
        self._grid = grid
        self._order = order
        self._plan_hash = plan_hash
        self._users = users
        self._most = most_examples
        self._turned_away: set[int] = set()
        self._short = ""

    def gather(self, *, limit: float) -> None:
        """Wait for as many nodes as users, then ask until all have answered; each at most `limit` seconds."""
        deadline = time.monotonic() + limit
        while self._come() < len(self._users) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if (come := self._come()) < len(self._users):
            self._short = f"{come} of {len(self._users)} nodes came within {limit:.0f} s; "
        deadline = time.monotonic() + limit
        for _ in range(_ATTEMPTS):
            self.ask(timeout=max(_PAUSE_S, deadline - time.monotonic()))
            if not self.silent or time.monotonic() > deadline:
                return
            time.sleep(_PAUSE_S)

    def ask_again(self, *, limit: float) -> None:
        """Before a round: whoever is missing may have come."""
        if not self._users or self.absent():
            self.ask(timeout=limit)

    def ask(self, *, timeout: float) -> None:
        """Ask every node that is neither known nor refused, once."""
        nodes = sorted(set(self._grid.get_node_ids()) - self.nodes.keys() - self._turned_away)
        self.silent = dict.fromkeys(nodes, _NO_ANSWER)
        messages = [
            Message(content=RecordDict({"config": self._order}), message_type="query.hello", dst_node_id=node)
            for node in nodes
        ]
        replies = self._grid.send_and_receive(messages, timeout=timeout) if messages else []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            self._hear(reply.metadata.src_node_id, reply)

    def absent(self) -> list[str]:
        """The users expected who do not take part, by name."""
        return sorted(set(self._users) - set(self.nodes.values()))

    def missing(self) -> dict[str, str]:
        """Every user and node that does not take part -> why."""
        users = {user: "no node says it is this user" for user in self.absent() if user not in self.refused}
        silent = {f"node {node}": why for node, why in self.silent.items()}
        return {**users, **silent, **self.refused}

    def check(self, least: int) -> None:
        """FederationError naming all who are not there, if fewer than `least` users are; 0 wants
        everybody.
        """
        missing = self.missing()
        short = self.absent() if self._users else missing
        if len(self.nodes) >= max(1, least) and (least or not short):
            return
        why = "; ".join(f"{who}: {reason}" for who, reason in missing.items())
        wanted = "is 0, which wants everybody" if least == 0 else f"is {least}"
        raise FederationError(
            f"{self._short}{len(self.nodes)} users can train, federation.min_users {wanted}; not there: {why}"
            "; see to their nodes, or set federation.min_users to how many are enough"
        )

    def _come(self) -> int:
        return len(list(self._grid.get_node_ids()))

    def _hear(self, node: int, reply: Message) -> None:
        if node not in self.silent:
            return
        if reply.has_error():
            self.silent[node] = str(reply.error.reason)
            return
        del self.silent[node]
        said = reply.content.config_records.get("hello", ConfigRecord())
        user, examples = str(said.get("user", "")), said.get("examples")
        if fault := self._name_fault(user):
            self._turn_away(node, f"node {node}", fault)
        elif said.get("plan-hash") != self._plan_hash:
            self._turn_away(node, user, "holds another layer plan")
        elif type(examples) is not int or not 1 <= examples <= self._most:
            expected = f"expected a whole number from 1 to data.train_examples = {self._most}"
            self._turn_away(node, user, f"says it has {examples!r} examples to train on, {expected}")
        else:
            self.nodes[node], self.examples[user] = user, examples

    def _turn_away(self, node: int, who: str, why: str) -> None:
        self._turned_away.add(node)
        self.refused[who] = why

    def _name_fault(self, user: str) -> str:
        """Why a node cannot go by this name, or "": adapters are stored under it, one a user."""
        try:
            check_user_id(user)
        except RegistryError as error:
            return str(error)
        return f"says it is user {user!r}, and so does another node" if user in self.nodes.values() else ""
