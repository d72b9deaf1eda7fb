"""Looks at servers and run folders beside the requests, so that no page waits for either."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import requests

from soppu.dashboard import figures
from soppu.dashboard.figures import Figures, Traffic
from soppu.dashboard.runs import Runs

EVERY_S = 2.0
_TIMEOUT_S = 1.5
_KEPT = 60  # looks at a server that sparklines are made of
_MOST_BYTES = 32 << 20  # of one answer
_log = logging.getLogger(__name__)


@dataclass
class Server:
    """One serving target: what it last said, or why it says nothing."""

    name: str
    url: str
    figures: Figures | None = None
    fault: str = "not asked yet"
    history: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))  # time, requests

    @property
    def rates(self) -> list[float]:
        """Requests a second between looks; a server that was started anew begins at 0 again."""
        pairs = list(self.history)
        return [
            max(0.0, after - before) / max(end - begin, 1e-9)
            for (begin, before), (end, after) in zip(pairs, pairs[1:], strict=False)
        ]


class Watcher:
    """Threads for run folders, large reports and each server: one that hangs keeps nothing else waiting."""

    def __init__(self, runs: Runs, targets: Mapping[str, str], *, every_s: float = EVERY_S) -> None:
        self.runs = runs
        self.servers = tuple(Server(name, url.rstrip("/")) for name, url in targets.items())
        self._every_s = every_s
        self._stop = threading.Event()
        reading = [("runs", runs.refresh), ("large reports", runs.read_large)]
        jobs = [*reading, *((one.name, lambda one=one: look(one)) for one in self.servers)]
        self._threads = [  # daemons: one that waits for a server does not keep the process
            threading.Thread(target=self._loop, args=job, name=f"dashboard {job[0]}", daemon=True)
            for job in jobs
        ]

    def start(self) -> None:
        """Read the runs once, so that the first page has them, and go on beside."""
        self.runs.refresh()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the look under way."""
        self._stop.set()

    def of_user(self, user: str) -> list[tuple[Server, Traffic]]:
        """The traffic of one user at each server that has had any."""
        found = []
        for server in self.servers:
            seen = server.figures
            if seen is not None and user in seen.users:
                found.append((server, seen.users[user]))
        return found

    def _loop(self, name: str, job: Callable[[], None]) -> None:
        while not self._stop.wait(self._every_s):
            try:
                job()
            except Exception:  # of any kind: the next look may succeed, and the page says what it has
                _log.exception("looking at %s failed", name)


def look(server: Server) -> None:
    """Ask a server for its figures, and note them or why there are none."""
    try:
        with requests.get(f"{server.url}/metrics", timeout=_TIMEOUT_S, stream=True) as answer:
            answer.raise_for_status()
            body = answer.raw.read(_MOST_BYTES + 1, decode_content=True)
        if len(body) > _MOST_BYTES:
            raise ValueError(f"/metrics is larger than {_MOST_BYTES >> 20} MiB")
        found = figures.read(body.decode())
    except (requests.RequestException, ValueError) as error:
        server.fault = _short(error)
        return
    server.figures, server.fault = found, ""
    server.history.append((time.time(), found.total.requests))


def _short(error: Exception) -> str:
    if isinstance(error, requests.ConnectionError):
        return "does not answer"
    if isinstance(error, requests.Timeout):
        return f"did not answer within {_TIMEOUT_S} s"
    return str(error)[:200]
