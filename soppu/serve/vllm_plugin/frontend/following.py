"""Following: a registry's publications are taken over as they come, so that replicas of a fleet converge.

Only a publication that is new here changes anything: what is activated by hand stays until the next.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass, replace

from soppu import published
from soppu.blobs import open_blobs
from soppu.errors import SoppuError
from soppu.serve.vllm_plugin.frontend.control import Control
from soppu.serve.vllm_plugin.settings import Settings

_LOG = logging.getLogger("vllm.soppu")
_LONGEST_WAIT = 300.0  # seconds between two tries of a bundle that does not fit


@dataclass(frozen=True)
class Report:
    """How following goes; `error` is why the last look or change failed, "" where it did not."""

    registry: str
    published: str = ""  # the bundle published last, as far as is known
    at: str = ""  # when
    error: str = ""
    looked: float = 0.0  # Unix time of the last look


class Follower:
    """Looks at a registry, in a thread of its own, until told to stop. RegistryError: no such backend."""

    def __init__(self, control: Control, settings: Settings) -> None:
        self._control, self._url, self._every = control, settings.follow_url, settings.follow_seconds
        self._blobs = open_blobs(settings.follow)
        self._wait, self._not_before, self._tried = 0.0, 0.0, ""
        self._stop = threading.Event()
        self.report = Report(self._blobs.name)

    def start(self) -> None:
        """Look now, and from then on."""
        threading.Thread(target=self._run, name="soppu-follow", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def look(self) -> None:
        """Look once, and take over what is new. Whatever fails is in `report`, and is tried again later."""
        found = self.report
        try:
            pointer = published.newest(self._blobs, self._url)
            if pointer is None:
                to = f" to {self._url}" if self._url else ""
                self._say(Report(found.registry, error=f"{found.registry}: nothing was published{to} yet"))
                return
            found = Report(found.registry, pointer.bundle_id, pointer.at, found.error)
            if self._control.followed != pointer.mark and self._is_due(pointer.mark):
                self._control.follow(published.bundle_path(self._blobs, pointer.bundle_id), pointer=pointer)
        except SoppuError as error:
            self._wait = min(max(2 * self._wait, self._every), _LONGEST_WAIT)
            self._not_before = time.monotonic() + self._wait
            self._say(Report(found.registry, found.published, found.at, str(error)))
            return
        if self._control.followed == pointer.mark:
            self._wait = self._not_before = 0.0
            found = Report(found.registry, found.published, found.at)
        self._say(found)

    def _is_due(self, mark: str) -> bool:
        """Whether to try a publication now: a new one at once, one that failed after a while."""
        if mark != self._tried:
            self._tried, self._wait = mark, 0.0
            return True
        return time.monotonic() >= self._not_before

    def _say(self, report: Report) -> None:
        if report.error and report.error != self.report.error:
            _LOG.error("following %s: %s", report.registry, report.error)
        self.report = replace(report, looked=time.time())

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception as error:  # of any kind: a thread that ends would be a replica that stays behind
                self._say(Report(self.report.registry, self.report.published, self.report.at, repr(error)))
            self._stop.wait(self._every)


def health(control: Control, follower: Follower | None) -> tuple[bool, dict[str, object]]:
    """Whether this server serves what it should, and what it says of itself.

    It does not where it follows a registry and what is published there could not be taken over, or where
    an adapter that was loaded before a restart could not be served again.
    """
    report = follower.report if follower else None
    behind = bool(report and (report.error or control.followed.split(" ")[-1] != report.published))
    content = control.state.content
    return not behind, {
        "status": "behind" if behind else "ok",
        "active": control.bank.active,
        "previous": content.previous,
        "staged": [one for one in content.bundles if one != control.bank.active],
        "lost_adapters": control.lost,
        "following": asdict(report) if report else None,
    }
