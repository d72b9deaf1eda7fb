"""Searches that need passes over many deltas, written as generators so that they share passes over a fleet.

A search yields (pass, n): the pass it needs, which is to see every n-th batch, beginning with the first. It
goes on once the pass has seen them, and returns its result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Protocol, TypeVar

from soppu.compress.linalg.sketch import Deltas

T = TypeVar("T")


class Pass(Protocol):
    """What looks at all deltas of one module once, a batch at a time and in order."""

    def add(self, batch: Deltas) -> None:
        """Take the next deltas."""
        ...


Asked = tuple[Pass, int]
Steps = Generator[Asked, None, T]


def begun(searches: Mapping[str, Steps[T]], found: dict[str, T]) -> Iterator[tuple[str, Asked]]:
    """The next pass of every search; those that need none have their result put into `found`."""
    for name, search in searches.items():
        try:
            yield name, next(search)
        except StopIteration as end:
            found[name] = end.value
