"""Fit: what every method gives back. And the writer that turns coded batches of users into pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.codec import page
from soppu.compress.codec.basis import Basis
from soppu.compress.numbers.components import Components, concatenate
from soppu.compress.numbers.errors import Certificate

_PAGE_NUMBERS = (
    1 << 22
)  # a page is read as a whole: small enough for one user, large enough for its code tables

Bases = tuple[Basis, Basis]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Page:
    """The bytes of some consecutive users' components."""

    first: int
    users: int
    data: bytes


@dataclass(frozen=True, eq=False)
class Fit:
    """A compressed fleet.

    Attributes:
        bases: module -> output and input basis of every cluster; all clusters of a module have the same
        ranks. cluster: (n,) int64 whose bases a user's coordinates refer to. pages: all users, in order.
        squared: (modules, n) float64 squared Frobenius errors as stored. certificates: module -> what a
        shared basis of this rank can do at all. steps: module -> alternations made. numbers: how many
        numbers bases and components hold. storage: how they are kept, in words.
    """

    bases: Mapping[str, tuple[Bases, ...]]
    cluster: Tensor
    pages: tuple[Page, ...]
    squared: Tensor
    certificates: Mapping[str, Certificate]
    steps: Mapping[str, int]
    numbers: int
    storage: str


def page_shapes(
    shapes: Mapping[str, tuple[int, int]], bases: Mapping[str, Sequence[Bases]]
) -> list[page.ModuleShape]:
    """What pages need to know of every module."""
    return [
        page.ModuleShape(o, i, bases[name][0][0].k, bases[name][0][1].k) for name, (o, i) in shapes.items()
    ]


class PageWriter:
    """Collects coded users, batch after batch, and closes a page when it is full."""

    def __init__(self) -> None:
        self.pages: list[Page] = []
        self._held: list[list[Components]] = []
        self._first = self._users = self._numbers = 0
        self.numbers = 0

    def add(self, parts: list[Components], *, users: int) -> None:
        """The components of the next `users` users, numbered from 0: one entry for every module."""
        shift = torch.arange(self._users, self._users + users)
        self._held.append([part.renumbered(shift) for part in parts])
        self._users += users
        size = sum(numbers(part) for part in parts)
        self._numbers += size
        self.numbers += size + sum(len(part) for part in parts)
        if self._numbers >= _PAGE_NUMBERS:
            self.close()

    def close(self) -> tuple[Page, ...]:
        """All pages; what is held becomes the last one."""
        if self._users:
            parts = [concatenate(column) for column in zip(*self._held, strict=True)]
            self.pages.append(Page(self._first, self._users, page.encode(parts, users=self._users)))
            self._first += self._users
            self._held, self._users, self._numbers = [], 0, 0
        return tuple(self.pages)


def numbers(part: Components) -> int:
    """How many coordinates and own numbers components hold."""
    return sum(t.numel() for side in (part.left, part.right) for t in (side.coords, side.own))
