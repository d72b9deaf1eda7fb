"""Who takes part: every node is asked who it is, and asked again until all are there or it is time to begin.

Nobody is lost in silence: whoever is not known is absent, and asked again before the next round, or refused,
and named with the reason. Nobody is believed: who a node is follows from its registered id where there is a
table of members, from its place in a simulation, and else from what it says, unless two say the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.agreement import short
from soppu.errors import FederationError, RegistryError
from soppu.registry import check_user_id

_ATTEMPTS = 3  # how often a node is asked before the first round
_PAUSE_S = 0.5
_NO_ANSWER = "no answer"
_REPLY = {"hello": ConfigRecord}


class _Refusal(Exception):
    """Why a node cannot take part, and whose it is, if that is known; never leaves this file."""

    def __init__(self, why: str, user: str = "") -> None:
        super().__init__(why)
        self.user = user


@dataclass(frozen=True)
class _Claim:
    """What a node says of itself, found to be possible."""

    user: str
    examples: int


class Roll:
    """The roll of a federation. `nodes` is what is known by now; it grows when somebody joins.

    Args:
        order: what a node is told with the question.
        plan_hash: of the layer plan a node has to hold.
        users: everybody who is expected; empty where any node may come.
        most_examples: how many a user may say to have.
        members: node id -> user, of all who may take part, where nodes are registered; others are not asked.
        simulated: the nodes are ours, and each is told which user it is.

    Attributes:
        nodes: node id -> user, of those who take part.
        examples: user -> how many examples they said to train on.
        refused: user or node -> why they cannot take part; they are not asked again.
        silent: node -> why it is not known yet; it is asked again.
    """

    def __init__(
        self,
        grid: Grid,
        order: ConfigRecord,
        *,
        plan_hash: str,
        users: Sequence[str],
        most_examples: int,
        members: Mapping[int, str] | None = None,
        simulated: bool = False,
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
        self._members = None if members is None and not simulated else dict(members or {})
        self._simulated = simulated
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
        here = set(self._grid.get_node_ids())
        nodes = [
            node for node in sorted(here - self.nodes.keys() - self._turned_away) if self._may_come(node)
        ]
        self.silent = dict.fromkeys(nodes, _NO_ANSWER)
        messages = [
            Message(
                RecordDict({"config": self._question(node)}), message_type="query.hello", dst_node_id=node
            )
            for node in nodes
        ]
        replies = self._grid.send_and_receive(messages, timeout=timeout) if messages else []
        claims: dict[int, _Claim] = {}
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if node not in self.silent:
                continue
            if reply.has_error():
                self.silent[node] = short(reply.error.reason)
                continue
            del self.silent[node]
            try:
                claims[node] = self._heard(node, reply)
            except _Refusal as refusal:
                self._turn_away(node, str(refusal), user=refusal.user)
        self._enrol(claims, here)

    def absent(self) -> list[str]:
        """The users expected who do not take part, by name."""
        return sorted(set(self._users) - set(self.nodes.values()))

    def missing(self) -> dict[str, str]:
        """Every user and node that does not take part -> why."""
        users = {user: "no node says it is this user" for user in self.absent() if user not in self.refused}
        silent = {(self._members or {}).get(node, f"node {node}"): why for node, why in self.silent.items()}
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

    def _may_come(self, node: int) -> bool:
        """Whether a node is asked at all; one that is no member is refused unasked."""
        if self._members is None or node in self._members:
            return True
        if self._simulated and (free := [user for user in self._users if user not in self._members.values()]):
            self._members[node] = free[0]
            return True
        self._turn_away(node, "is nobody's: the federation's members are others")
        return False

    def _question(self, node: int) -> ConfigRecord:
        """The order, for a simulated node with its user's name: it has none of its own."""
        named = {"user": (self._members or {})[node]} if self._simulated else {}
        return ConfigRecord({**self._order, **named})

    def _heard(self, node: int, reply: Message) -> _Claim:
        """What a node says, or _Refusal: whatever is in a reply, it ends nobody else's federation."""
        known = (self._members or {}).get(node, "")
        if not reply.has_content() or {key: type(item) for key, item in reply.content.items()} != _REPLY:
            raise _Refusal("its reply to hello is not one record `hello`", known)
        said = reply.content.config_records["hello"]
        user, examples = said.get("user"), said.get("examples")
        try:
            check_user_id(user if type(user) is str else "")
        except RegistryError as error:
            raise _Refusal(str(error), known) from None
        if known and user != known:
            raise _Refusal(f"says it is user {user!r}, its node is {known!r}", known)
        if self._users and user not in self._users:
            raise _Refusal(f"says it is user {user!r}, who is not among those expected")
        whose = known or ("" if user in self.nodes.values() else str(user))
        if said.get("plan-hash") != self._plan_hash:
            raise _Refusal("holds another layer plan", whose)
        if type(examples) is not int or not 1 <= examples <= self._most:
            wanted = f"expected a whole number from 1 to data.train_examples = {self._most}"
            raise _Refusal(f"says it has {short(examples)} examples to train on, {wanted}", whose)
        return _Claim(str(user), examples)

    def _enrol(self, claims: Mapping[int, _Claim], here: set[int]) -> None:
        """Take up who is alone with a name. Of two nodes with one name both are refused: either may be wrong.

        Where members are known both are right, and the one that is there already stays.
        """
        for gone in [node for node in self.nodes if node not in here and self.nodes[node] in _names(claims)]:
            del self.nodes[gone]  # its user is back under another id
        for user in sorted(_names(claims)):
            holders = [node for node, name in self.nodes.items() if name == user]
            nodes = [node for node, claim in claims.items() if claim.user == user]
            if self._members is None and len(holders + nodes) > 1:
                for node in sorted(holders + nodes):
                    self.nodes.pop(node, None)
                    self._turn_away(node, f"says it is user {user!r}, and so does another node")
                self.examples.pop(user, None)
                continue
            for node in nodes[1:] if not holders else nodes:
                self._turn_away(node, f"is user {user!r}, who is here with another node")
            if not holders:
                self.nodes[nodes[0]], self.examples[user] = user, claims[nodes[0]].examples

    def _turn_away(self, node: int, why: str, *, user: str = "") -> None:
        self._turned_away.add(node)
        self.refused[user or f"node {node}"] = why


def _names(claims: Mapping[int, _Claim]) -> set[str]:
    return {claim.user for claim in claims.values()}
