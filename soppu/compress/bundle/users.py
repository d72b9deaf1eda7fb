"""Users: the names of a bundle's users as bytes, found by their hash: no Python object for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_TOGETHER = 4096  # names that are made at a time


class Users(Sequence[str]):
    """n names in order; `place` finds one in O(log n). Equal to any sequence of the same names."""

    def __init__(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """From the arrays that `pack` makes, which may lie in a file."""
        self._names, self._ends = arrays["names"], arrays["ends"]
        self._hashes, self._places = arrays["hashes"], arrays["places"]

    @classmethod
    def of(cls, names: Sequence[str]) -> Users:
        """From names in memory."""
        return cls(pack(names))

    def place(self, name: str) -> int | None:
        """Where a user stands; None for somebody unknown."""
        key = _hash(name)
        first = int(np.searchsorted(self._hashes, key))
        while first < len(self) and int(self._hashes[first]) == key:
            place = int(self._places[first])
            if self[place] == name:
                return place
            first += 1
        return None

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place(name) is not None

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """As of any sequence, without going through it."""
        place = self.place(value)
        if place is None or not start <= place < (len(self) if stop is None else stop):
            raise ValueError(f"{value!r} is not among {len(self)} users")
        return place

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            begin, end, step = place.indices(len(self))
            return (
                self._some(begin, end) if step == 1 else tuple(self[one] for one in range(begin, end, step))
            )
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        begin = int(self._ends[place - 1]) if place else 0
        return self._names[begin : int(self._ends[place])].tobytes().decode()

    def _some(self, begin: int, end: int) -> tuple[str, ...]:
        """The names from `begin` up to, not including, `end`."""
        if begin >= end:
            return ()
        start = int(self._ends[begin - 1]) if begin else 0
        ends = (self._ends[begin:end] - start).tolist()
        data = self._names[start : start + ends[-1]].tobytes()
        return tuple(data[a:b].decode() for a, b in zip([0, *ends], ends, strict=False))

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _TOGETHER):
            yield from self[begin : begin + _TOGETHER]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Users({len(self)}: {', '.join(self[:3])}, ...)"


def pack(names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Names end to end, where each ends, their hashes in order, and whose these are. O(n log n)."""
    encoded = [name.encode() for name in names]
    hashes = np.fromiter(map(_hash_bytes, encoded), np.int64, len(encoded))
    order = np.argsort(hashes, kind="stable")
    return {
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "ends": np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded))),
        "hashes": hashes[order],
        "places": order.astype(np.int32),
    }


def _hash(name: str) -> int:
    # what is no text in UTF-8 is nobody's name
    return _hash_bytes(name.encode(errors="surrogatepass"))


def _hash_bytes(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
