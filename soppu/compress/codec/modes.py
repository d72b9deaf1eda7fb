"""Modes: two bytes that say in which form a component is stored.

One byte a side, output side first: the place of the coordinates' width in `COORDS_WIDTHS` times 16, plus the
place of the own numbers' width in `OWN_WIDTHS`.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from soppu.compress.numbers.components import Components
from soppu.compress.numbers.quantise import AXIS, COORDS, FLOATS, QUANTISERS, TERNARY
from soppu.errors import BundleError

COORDS_WIDTHS = (0, AXIS, *COORDS, *FLOATS)
OWN_WIDTHS = (0, TERNARY, *QUANTISERS, *FLOATS)
# The streams of numbers in a page, in order.
NUMBERS = (*(("coords", width) for width in COORDS_WIDTHS[2:]), *(("own", width) for width in OWN_WIDTHS[1:]))
Modes = NDArray[np.uint8]
Counts = NDArray[np.int64]


def encode(part: Components) -> Modes:
    """(m, 2) modes of the components of a module. O(m)."""
    made = np.zeros((len(part), 2), np.uint8)
    for column, side in enumerate((part.left, part.right)):
        coords = _places(side.coords_width.numpy(), COORDS_WIDTHS)
        made[:, column] = coords << 4 | _places(side.own_width.numpy(), OWN_WIDTHS)
    return made


def check(modes: Modes, source: str) -> None:
    """Refuse widths that do not exist, and sides without numbers. Raises BundleError. O(m)."""
    unknown = (modes >> 4 >= len(COORDS_WIDTHS)) | (modes & 15 >= len(OWN_WIDTHS)) | (modes == 0)
    if unknown.any():
        raise BundleError(f"{source}: a side of mode 0x{modes[unknown][0]:02x}, which does not exist")


def gain_width(modes: Modes) -> int:
    """Gains are as exact as the numbers they belong to: of 16 bits where all of these are integers. O(m)."""
    return 32 if floats(modes).any() else 16


def floats(modes: Modes) -> NDArray[np.bool_]:
    """(m,) which components have numbers that are floats on either side. O(m)."""
    last = len(FLOATS)
    exact = (modes >> 4 >= len(COORDS_WIDTHS) - last) | (modes & 15 >= len(OWN_WIDTHS) - last)
    return np.asarray(exact.any(1))


class SideModes:
    """The modes of one side of one module, taken apart: which component has numbers of which width."""

    def __init__(self, modes: Modes, counts: Counts, *, features: int, k: int) -> None:
        """From (m,) checked modes, (users,) counts of components, o or i, the rank of the basis. O(m)."""
        self.coords_width = np.array(COORDS_WIDTHS, np.uint8)[modes >> 4]
        self.own_width = np.array(OWN_WIDTHS, np.uint8)[modes & 15]
        self.axis = np.where(self.coords_width == AXIS, places(counts), 0)
        self.has_beta = (self.coords_width > 0) & (self.own_width > 0)
        self.columns = {"coords": k, "own": features}

    def widths(self, field: str) -> Modes:
        """The widths of the components that have numbers of this field in a stream, in order."""
        if field == "own":
            return self.own_width[self.own_width > 0]
        return self.coords_width[self.coords_width > AXIS]

    def sizes(self) -> dict[tuple[str, int], int]:
        """How many numbers this side has of every field and width that it has any of."""
        made: dict[tuple[str, int], int] = {}
        for field, columns in self.columns.items():
            counts = np.bincount(self.widths(field))
            made |= {(field, int(width)): int(counts[width]) * columns for width in counts.nonzero()[0]}
        return made

    def within(self, field: str, width: int, span: slice) -> tuple[int, int]:
        """Where the numbers of the components in a span lie among this side's of one field and width."""
        held = self.own_width if field == "own" else self.coords_width
        same, columns = held == width, self.columns[field]
        begin = int(same[: span.start].sum()) * columns
        return begin, begin + int(same[span].sum()) * columns

    def part(self, span: slice) -> SideModes:
        """The same for the components in a span."""
        if span == slice(0, len(self.axis)):
            return self
        part = copy.copy(self)
        for name in ("coords_width", "own_width", "axis", "has_beta"):
            setattr(part, name, getattr(self, name)[span])
        return part

    def check(self, source: str) -> None:
        """Hold the coordinates against the basis. Raises BundleError."""
        k = self.columns["coords"]
        if not k and bool((self.coords_width > 0).any()):
            raise BundleError(f"{source}: coordinates at a module without a basis")
        if bool((self.axis >= max(k, 1)).any()):
            raise BundleError(f"{source}: coordinate {self.axis.max()} in a basis of rank {k}")


def places(counts: Counts) -> Counts:
    """Which component of its user each is, from the number every user has: (m,)."""
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.arange(len(starts)) - starts


def _places(widths: Modes, known: tuple[int, ...]) -> Modes:
    table = np.full(256, len(known), np.uint8)
    table[list(known)] = np.arange(len(known))
    found = table[widths]
    strange = widths[found == len(known)]
    if strange.size:
        raise BundleError(f"numbers of {strange[0]} bits, allowed: {', '.join(map(str, known))}")
    return found
