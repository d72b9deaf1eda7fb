"""Whose request is next: a queue that is fair by user, with bounds on what waits and on what is under way.

Start-time fair queueing (Goyal, Vin and Cheng 1996): a request is tagged with the virtual time at which its
user's work before it is done, the lowest tag goes first, and work is what a request asks for in tokens.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits

_KEPT = 1024  # users, before it is looked who of them has nothing to wait for


@dataclass(order=True)
class _Waiter:
    tag: float
    number: int
    user: str = field(compare=False)
    ready: asyncio.Future[None] = field(compare=False)


class Turns:
    """Turns of all users at the servers behind a gateway. For one event loop.

    While two users wait all the time, the work begun for them differs by at most one request of each, however
    much either of them asks for. A request costs O(log waiting).
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: list[_Waiter] = []
        self._done: dict[str, float] = {}  # the virtual time at which a user's work so far is done
        self._waiting: Counter[str] = Counter()
        self._present: Counter[str] = Counter()
        self._now = 0.0
        self._number = 0
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting.total()

    @contextmanager
    def present(self, user: str) -> Iterator[None]:
        """Counts a request of a user from its headers on. Refused: 429 where they have too many at once."""
        if self._present[user] >= self._limits.each_user:
            raise Refused(429, f"at most {self._limits.each_user} requests of one user at once", after=1)
        self._present[user] += 1
        try:
            yield
        finally:
            _less(self._present, user)

    @asynccontextmanager
    async def turn(self, user: str, work: float) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Refused: 429 where too many wait, or it does not come in time."""
        await self._enter(user, work)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._call()

    async def _enter(self, user: str, work: float) -> None:
        free = self.in_flight < self._limits.in_flight and not self._waiting.total()
        if not free:
            self._make_room(user)
        tag = max(self._now, self._done.get(user, 0.0))
        self._done[user] = tag + work
        if free:
            self._begin(tag)
            return
        self._number += 1
        waiter = _Waiter(tag, self._number, user, asyncio.get_running_loop().create_future())
        heapq.heappush(self._queue, waiter)
        self._waiting[user] += 1
        try:
            async with asyncio.timeout(self._limits.waiting_s):
                await waiter.ready
        except BaseException as error:
            if user in self._done:
                self._done[user] -= work
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise self._full() from None
            raise

    def _make_room(self, user: str) -> None:
        """Refuse who comes to a full queue; or, for who has fewer there, the last of who has the most."""
        if self._waiting.total() < self._limits.waiting:
            return
        most, count = max(self._waiting.items(), key=lambda item: item[1], default=("", 0))
        if count <= self._waiting[user] + 1:
            raise self._full()
        last = max(one for one in self._queue if one.user == most and not one.ready.done())
        last.ready.set_exception(self._full())
        _less(self._waiting, most)

    def _leave(self, waiter: _Waiter) -> None:
        """One who waited goes: refused, given up, or with a turn that nobody takes any more."""
        if waiter in self._queue:
            self._queue.remove(waiter)
            heapq.heapify(self._queue)
        if not waiter.ready.done() or waiter.ready.cancelled():
            _less(self._waiting, waiter.user)
        elif waiter.ready.exception() is None:  # called, and given up at the same moment
            self.in_flight -= 1
            self._call()

    def _call(self) -> None:
        """Give free turns to those with the lowest tags."""
        while self._queue and self.in_flight < self._limits.in_flight:
            waiter = heapq.heappop(self._queue)
            if waiter.ready.done():
                continue
            _less(self._waiting, waiter.user)
            self._begin(waiter.tag)
            waiter.ready.set_result(None)
        if not self._queue:
            self._forget()

    def _begin(self, tag: float) -> None:
        self.in_flight += 1
        self._now = max(self._now, tag)

    def _forget(self) -> None:
        """Users whose work is done by now begin anew, as everybody does who was not here."""
        if not self.in_flight:
            self._done.clear()
        elif len(self._done) > _KEPT:
            self._done = {user: done for user, done in self._done.items() if done > self._now}

    def _full(self) -> Refused:
        return Refused(429, "too many requests wait", after=self._limits.waiting_s / 4)


def _less(counter: Counter[str], user: str) -> None:
    counter[user] -= 1
    if not counter[user]:
        del counter[user]
