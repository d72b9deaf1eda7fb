"""Messages that are sent again while there is time: a node that crashed or lost its link keeps its place.

Flower's own `send_and_receive` takes an error for an answer and waits for whoever restarts until its time
is over. Here every node has a few attempts within one call, and a node that has gone is waited for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

_POLL_S = 0.5  # between two looks at what has come; Flower's own is 3
_SLACK_S = 5.0  # a message outlives its call, or a late look at its replies would find nothing to look at
_NOT_SENT = Error(code=0, reason="the message could not be handed over: the node is not there")


@dataclass
class _Parcel:
    """What one node is to get: the message, how often it was sent, since when it waits to be sent again."""

    message: Message
    tries: int = 0
    failed: Message | None = None
    since: float = 0.0


class Delivery(Grid):
    """A Grid that repeats what failed.

    Args:
        grid: Flower's.
        attempts: how often a message is sent to one node, at most.
        grace_s: how long a node that has gone is waited for before its failure is taken for an answer.
        heard: called with node id, replies so far, and messages sent, whenever a last reply has come.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        attempts: int = 3,
        grace_s: float = 60.0,
        heard: Callable[[int, int, int], None] = lambda node, done, total: None,
    ) -> None:
        self._grid = grid
        self._heard = heard
        self._attempts = attempts
        self._grace_s = grace_s

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """One reply a node, an error where its last attempt ended in one; nothing of a node that is silent.

        Returns when all have answered, or after `timeout` seconds with what has come by then. Messages live
        as long as the call: a node that begins with one later is told so by its age.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        waiting = [_Parcel(message) for message in messages]
        under_way: dict[str, _Parcel] = {}
        replies: list[Message] = []
        total = len(waiting)
        while waiting or under_way:
            waiting = self._send(waiting, under_way, deadline)
            if time.monotonic() >= deadline:
                break
            for reply in self._grid.pull_messages(list(under_way)) if under_way else []:
                if (parcel := under_way.pop(reply.metadata.reply_to_message_id, None)) is None:
                    continue
                if reply.has_error() and parcel.tries < self._attempts:
                    parcel.failed, parcel.since = reply, time.monotonic()
                    waiting.append(parcel)
                else:
                    replies.append(reply)
                    self._heard(reply.metadata.src_node_id, len(replies), total)
            given_up = [p for p in waiting if p.failed and time.monotonic() > p.since + self._grace_s]
            replies += [parcel.failed for parcel in given_up if parcel.failed]
            waiting = [parcel for parcel in waiting if parcel not in given_up]
            if waiting or under_way:
                time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        return replies + [parcel.failed for parcel in waiting if parcel.failed]

    def _send(self, waiting: list[_Parcel], under_way: dict[str, _Parcel], deadline: float) -> list[_Parcel]:
        """Hand over what can be; the others wait on."""
        if not waiting:
            return []
        here, left = set(self._grid.get_node_ids()), deadline - time.monotonic()
        if left <= 0:
            return waiting
        later = []
        for parcel in waiting:
            message = _copy(parcel.message, ttl=None if left == float("inf") else left + _SLACK_S)
            gone = message.metadata.dst_node_id not in here
            sent = [] if gone else [name for name in self._grid.push_messages([message]) if name]
            if sent:
                parcel.tries += 1
                under_way[sent[0]] = parcel
                continue
            if parcel.failed is None:
                parcel.failed, parcel.since = Message(_NOT_SENT, reply_to=message), time.monotonic()
            later.append(parcel)
        return later

    def set_run(self, run: Any) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As Flower's."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """As Flower's."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        return self._grid.pull_messages(message_ids)


def _copy(message: Message, *, ttl: float | None) -> Message:
    """The same to the same node, as a new message that lives `ttl` seconds."""
    known = message.metadata
    content: RecordDict = message.content
    return Message(
        content,
        dst_node_id=known.dst_node_id,
        message_type=known.message_type,
        ttl=ttl,
        group_id=known.group_id,
    )
