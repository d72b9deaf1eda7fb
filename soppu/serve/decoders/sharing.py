"""Sharing: which layers of a row's keys and values are the base model's, whatever its user's adapter adds.

Below the lowest layer that an adapter changes, a prompt is computed alike for everybody.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Iterable

from soppu.serve.decoders.row_pages import BASE, Part
from soppu.serve.layers.factors import BundleSlot, Slot

_MOST_CUTS = 3  # each costs the states of every page; where more are asked for, less is shared
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD = "lm_head"


class Sharing:
    """Cuts the layers where adapters begin. One thread asks; an adapter is known by its slot, not its name.

    So another version of an adapter, or one loaded again, has nothing in common with the one before.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._cuts: list[int] = []
        self._numbers = itertools.count(BASE + 1)
        self._known: weakref.WeakKeyDictionary[Slot, tuple[int, int]] = weakref.WeakKeyDictionary()

    def parts(self, slot: Slot | None) -> tuple[Part, ...]:
        """The layers in parts, the base model's first; None is the base model itself."""
        whose, lowest = (BASE, self._layers) if slot is None else self._entry(slot)
        bounds = itertools.pairwise([0, *self._cuts, self._layers])
        return tuple(Part(first, end, BASE if end <= lowest else whose) for first, end in bounds)

    def _entry(self, slot: Slot) -> tuple[int, int]:
        if slot not in self._known:
            names = slot.modules if isinstance(slot, BundleSlot) else slot.pairs
            lowest = lowest_layer(names, layers=self._layers)
            if 0 < lowest < self._layers and lowest not in self._cuts and len(self._cuts) < _MOST_CUTS:
                self._cuts = sorted([*self._cuts, lowest])
            self._known[slot] = next(self._numbers), lowest
        return self._known[slot]


def lowest_layer(modules: Iterable[str], *, layers: int) -> int:
    """The first layer that has one of the modules; `layers` where none has; 0 for a name that is unknown."""
    numbers = [layers]
    for name in modules:
        match = _LAYER.match(name)
        numbers.append(int(match[1]) if match else layers if name == _HEAD else 0)
    return min(numbers)
