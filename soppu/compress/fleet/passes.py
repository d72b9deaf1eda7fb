"""Passes over a fleet: every module of every batch in canonical form.

Canonical forms are kept from the first pass on for as many batches as there is room for; the others are read
and decomposed again each time. So memory is bounded, and a fleet that fits is read and decomposed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from soppu.compress.fleet.survey import Batch, Fleet
from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.sketch import Steps, T, begun
from soppu.compress.linalg.whitening import Whitener

ROOM = 512 << 20  # bytes of canonical forms that are kept
Progress = Callable[[str, int, int], None]  # what is done, users done, users in all


class Passes:
    """A fleet, its canonical forms, and what is kept of them.

    Args:
        fleet: whose passes.
        whiteners: module -> Whitener, in whose metric forms are made.
        room: bytes of forms that are kept, those of the first users; by default ROOM.
    """

    def __init__(self, fleet: Fleet, whiteners: Mapping[str, Whitener], *, room: int | None = None) -> None:
        self.fleet, self.whiteners = fleet, whiteners
        self._room = ROOM if room is None else room
        self._kept: dict[tuple[int, str], Canonical] = {}

    def form(self, batch: Batch, module: str) -> Canonical:
        """The form of a batch at a module. Unless kept O(b (o + i) r^2), whitened O(b r i^2) more."""
        key = (batch.first, module)
        if key in self._kept:
            return self._kept[key]
        made = canonical(*batch.factors(module), whitener=self.whiteners.get(module), overwrite=True)
        if made.nbytes <= self._room:
            self._kept[key] = made
            self._room -= made.nbytes
        return made

    def each(self, progress: Progress, *, note: str) -> Iterator[tuple[str, Canonical]]:
        """One pass over all modules of all batches."""
        for batch in self.fleet.batches():
            for name in self.fleet.shapes:
                yield name, self.form(batch, name)
            progress(note, batch.first + batch.size, len(self.fleet.users))

    def run(self, searches: Mapping[str, Steps[T]], progress: Progress, *, note: str) -> dict[str, T]:
        """Bring a search for each module to its end, all of them in the same passes."""
        found: dict[str, T] = {}
        under_way, count = dict(begun(searches, found)), 0
        while under_way:
            count += 1
            for number, batch in enumerate(self.fleet.batches()):
                for name, (one, every) in under_way.items():
                    if number % every == 0:
                        one.add(self.form(batch, name))
                progress(f"{note}, pass {count}", batch.first + batch.size, len(self.fleet.users))
            under_way = dict(begun({name: searches[name] for name in under_way}, found))
        return found
