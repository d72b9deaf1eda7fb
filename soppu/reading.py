"""Adapters that are read when somebody asks for one, as a mapping: what a compression of many users takes.

Nothing is kept: memory is what the caller holds at a time, and every pass reads again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from soppu.adapter import LoraAdapter

Place = TypeVar("Place")


class AdaptersOnDemand(Mapping[str, LoraAdapter], Generic[Place]):
    """User -> adapter, in the order of `places`."""

    def __init__(self, places: Mapping[str, Place], read: Callable[[Place], LoraAdapter]) -> None:
        """Take down where adapters are; `read` gives the one at a place, and raises what it raises."""
        self._places = dict(places)
        self._read = read

    def __getitem__(self, user: str) -> LoraAdapter:
        """Read the user's adapter, each time. KeyError for somebody else."""
        return self._read(self._places[user])

    def __contains__(self, user: object) -> bool:
        """Whether there is such a user; reads nothing."""
        return user in self._places

    def __iter__(self) -> Iterator[str]:
        """Names, in order."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many users."""
        return len(self._places)
