"""The servers behind the gateway: which of them answer, and which is asked next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0


@dataclass
class Replica:
    """One address: whether it is healthy, as far as is known, and how many requests are under way there."""

    url: str
    healthy: bool = True
    in_flight: int = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request there."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Replicas:
    """All addresses that requests went to or may go to. For one event loop."""

    def __init__(self, client: httpx.AsyncClient, known: Callable[[], Iterable[str]]) -> None:
        self._client = client
        self._known = known
        self._replicas: dict[str, Replica] = {}

    def every(self) -> tuple[Replica, ...]:
        """Those that are known."""
        return tuple(self._replicas.values())

    def ordered(self, urls: Iterable[str]) -> list[Replica]:
        """Those at `urls`, in the order to try them: healthy ones first, the least busy of them first."""
        chosen = [self._replicas.setdefault(url, Replica(url)) for url in urls]
        return sorted(chosen, key=lambda one: (not one.healthy, one.in_flight))

    def gone(self, replica: Replica) -> None:
        """Nobody listened there: others come first until it is healthy again."""
        if replica.healthy:
            _LOG.warning("%s does not answer", replica.url)
        replica.healthy = False

    async def watch(self, *, every: float) -> None:
        """Look at all of them, again and again, until cancelled."""
        while True:
            try:
                urls = {*self._replicas, *await asyncio.to_thread(lambda: tuple(self._known()))}
            except Exception as error:  # the catalogue is away: those known are looked at all the same
                _LOG.warning("the servers published to are not known now: %s", error)
                urls = set(self._replicas)
            await asyncio.gather(*(self._look(replica) for replica in self.ordered(urls)))
            await asyncio.sleep(every)

    async def _look(self, replica: Replica) -> None:
        try:
            answer = await self._client.get(f"{replica.url}/health", timeout=_LOOK_SECONDS)
            healthy = answer.status_code == 200
        except httpx.HTTPError:
            healthy = False
        if healthy != replica.healthy:
            _LOG.warning("%s is %s", replica.url, "healthy again" if healthy else "not healthy")
        replica.healthy = healthy
