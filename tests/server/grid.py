"""A federation in one process: a Flower Grid whose nodes are calls of the ClientApp. No Ray, no SuperLink."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app


def context(node_id: int, **node_config: Any) -> Context:
    """What Flower hands a ClientApp beside the message."""
    return Context(run_id=1, node_id=node_id, node_config=node_config, state=RecordDict(), run_config={})


def identify(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Say who this process is to Flower: a Message cannot be made without. SuperLink and SuperNode set it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        put(TaskIdentity, name, 1)


class InProcessGrid(Grid):
    """Nodes 100, 101, ... that answer one after the other.

    Args:
        nodes: node configurations, one a node.
        tamper: sees every reply before the server does; gives another one, or None for a node that is silent.
    """

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        *,
        tamper: Callable[[Message, Message], Message | None] | None = None,
    ) -> None:
        self.contexts = {100 + n: context(100 + n, **config) for n, config in enumerate(nodes)}
        self.tamper = tamper
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.ready: dict[str, Message] = {}  # message -> reply that was not yet asked for

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for message in messages if (reply := self._answer(message)) is not None]

    def _answer(self, message: Message) -> Message | None:
        self.sent.append(message)
        try:
            reply: Message | None = app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # Flower's node does the same: the server hears of it, and no more
            reply = Message(Error(code=1, reason=str(error)), reply_to=message)
        if self.tamper is not None and reply is not None:
            reply = self.tamper(message, reply)
        if reply is not None:
            self.replies.append(reply)
        return reply

    def of_type(self, kind: str) -> list[Message]:
        """Messages sent so far, by type: "train", "query.hello"."""
        return [message for message in self.sent if message.metadata.message_type == kind]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            names.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            if (reply := self._answer(message)) is not None:
                self.ready[names[-1]] = reply
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.ready.pop(name) for name in list(message_ids) if name in self.ready]
