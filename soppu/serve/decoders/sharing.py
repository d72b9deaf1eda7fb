"""Sharing: which layers of a row's keys and values are the base model's, whatever its user's adapter adds.

Below the lowest layer that an adapter changes, a prompt is computed alike for everybody.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Iterable

from soppu.serve.decoders.pages import Owner
from soppu.serve.decoders.row_pages import BASE, Part
from soppu.serve.layers.factors import BundleSlot, ModuleFactors, PairSlot, Slot

_MOST_CUTS = 3  # each costs the states of every page; where more are asked for, less is shared
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD = "lm_head"


class Sharing:
    """Cuts the layers where adapters begin. For one thread. An adapter is known by its tensors, not its name.

    So another version of an adapter, or one loaded again, has nothing in common with the one before.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._cuts: list[int] = []
        self._numbers = itertools.count(1)
        # of adapters, and of bundles by their first module: a number never given twice, and the lowest layer
        self._known: weakref.WeakKeyDictionary[PairSlot | ModuleFactors, tuple[int, int]]
        self._known = weakref.WeakKeyDictionary()

    def parts(self, slot: Slot | None) -> tuple[Part, ...]:
        """The layers in parts, the base model's first; None is the base model itself."""
        whose, lowest = (BASE, self._layers) if slot is None else self._entry(slot)
        bounds = itertools.pairwise([0, *self._cuts, self._layers])
        return tuple(Part(first, end, BASE if end <= lowest else whose) for first, end in bounds)

    def _entry(self, slot: Slot) -> tuple[Owner, int]:
        """Whose the layers from the lowest on are."""
        modules = slot.modules if isinstance(slot, BundleSlot) else slot.pairs
        if not modules:
            return BASE, self._layers
        known = next(iter(slot.modules.values())) if isinstance(slot, BundleSlot) else slot
        if known not in self._known:
            self._known[known] = next(self._numbers), self._cut(lowest_layer(modules, layers=self._layers))
        number, lowest = self._known[known]
        return (number, slot.index if isinstance(slot, BundleSlot) else 0), lowest

    def _cut(self, lowest: int) -> int:
        if 0 < lowest < self._layers and lowest not in self._cuts and len(self._cuts) < _MOST_CUTS:
            self._cuts = sorted([*self._cuts, lowest])
        return lowest


def lowest_layer(modules: Iterable[str], *, layers: int) -> int:
    """The first layer that has one of the modules; `layers` where none has; 0 for a name that is unknown."""
    numbers = [layers]
    for name in modules:
        match = _LAYER.match(name)
        numbers.append(int(match[1]) if match else layers if name == _HEAD else 0)
    return min(numbers)
