"""Joined: the records of the users under way, in one tensor, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soppu.serve.layers.records import Records

_ROOM = 2  # times what is asked for, so that a user who comes seldom has all others copied again


class Joined:
    """Records of one user each, put beside each other. A record is copied once while it is asked for.

    For one thread. A table that was given stays right: what it speaks of is never written again.
    """

    def __init__(self) -> None:
        self._data = torch.zeros(0, dtype=torch.int32)
        self._end = 0
        self._held: dict[int, tuple[Records, int]] = {}  # id -> the record, and where it begins

    def of(self, records: Sequence[Records]) -> tuple[Records, list[int]]:
        """A table of these, and which user each is there: who has nothing comes last. O(what is new)."""
        some = {id(one): one for one in records if len(one.data)}
        self._make_room(some)
        for key, one in some.items():
            if key not in self._held:
                self._data[self._end : self._end + len(one.data)] = one.data
                self._held[key] = one, self._end
                self._end += len(one.data)
        order = sorted(some, key=lambda key: self._held[key][1])
        # a record begins where this says; the kernels ask how far it goes only to know whether there is one
        starts = [self._held[key][1] for key in order]
        end = starts[-1] + len(some[order[-1]].data) if order else 0
        places, without = {key: place for place, key in enumerate(order)}, len(order)
        found = []
        for one in records:
            found.append(places.get(id(one), without))
            without += id(one) not in places
        starts += [end] * (without - len(order) + 1)
        first, floats = records[0], any(one.floats for one in some.values())
        return Records(self._data, torch.tensor(starts), first.shapes, first.ranks, floats), found

    def _make_room(self, some: dict[int, Records]) -> None:
        """Where the new ones do not fit, a new tensor of those asked for alone."""
        new = sum(len(one.data) for key, one in some.items() if key not in self._held)
        if self._end + new > len(self._data):
            whole = sum(len(one.data) for one in some.values())
            self._data = torch.empty(_ROOM * whole, dtype=torch.int32)
            self._held, self._end = {}, 0
