"""The run of a folder, followed while it goes on: what is new of it, and whether its process is there."""

from __future__ import annotations

from pathlib import Path

from soppu.progress.events import BEGAN, FAILED, FILE, RUN, Event, Reader, is_gone
from soppu.progress.lines import Lines
from soppu.progress.picture import Picture


class Followed:
    """The run of a folder, looked at again and again.

    Args:
        folder: the run's folder.
        of: who asked for the run that is meant; lines of another are not shown. "" takes the last run there.
    """

    def __init__(self, folder: Path, *, of: str = "") -> None:
        self.folder, self._of = folder, of
        self._reader = Reader(folder / FILE)
        self._begin(None)

    def look(self) -> Picture:
        """The run as it is now."""
        began = self.picture.began
        gone = began is not None and is_gone(began)  # first: what it wrote before it went is read after
        for event in self._reader.read():
            if (event.stage, event.state) == (RUN, BEGAN):
                self._begin(event)
            began = self.picture.began
            if not self._other and (began is None or event.pid == began.pid):
                self.picture.add(event)
                self.lines += self._made.of(event)
        if gone and self.picture.began == began and not self.picture.ended:
            self.picture.ended, self.picture.error = FAILED, _died(self.picture)
        return self.picture

    def _begin(self, began: Event | None) -> None:
        self.picture, self._made = Picture(), Lines()
        self.lines: list[str] = []
        self._other = bool(self._of) and (began is None or began.of != self._of)


def under_way(folder: Path) -> bool:
    """Whether a run goes on in a folder now. O(lines)."""
    found = Followed(folder).look()
    return found.began is not None and not found.ended


def _died(found: Picture) -> str:
    began, stage = found.began, found.now
    assert began is not None
    where = f" in stage {stage.name}, {stage.share:.0%} of it done" if stage else ""
    return (
        f"its process {began.pid} has died{where}; what it has finished is kept:"
        " started again, the same run goes on from there"
    )
