"""Blocks: memory for keys and values in pieces of one size, taken and given back by number."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

BLOCK = 16  # tokens of one layer in a block
EMPTY, SPARE = 0, 1  # blocks of nobody: of zeros, and what padding is written to
_OWN = 2  # how many these are
_PAGE = mmap.PAGESIZE


class Blocks:
    """At most `count` blocks. A block that is free is of zeros.

    On a CPU under Linux a block takes memory when it is first written to, and what is given back goes to the
    operating system, where a block is made of whole pages of memory (4 KiB: all but tiny models); elsewhere
    the memory of all blocks is taken at the first use, and kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._stores: dict[tuple[int, int], _Store] = {}
        self._used_before: list[int] = []
        self._next = _OWN  # blocks from here on were never taken

    @property
    def free(self) -> int:
        """Blocks that may be taken."""
        return len(self._used_before) + self.count + _OWN - self._next

    @property
    def block_bytes(self) -> int:
        """Of one block; 0 before anything was written."""
        return max((store.size for store in list(self._stores.values())), default=0)

    def take(self, count: int) -> list[int]:
        """So many blocks, there have to be as many `free`; those that were used before first."""
        taken = [self._used_before.pop() for _ in range(min(count, len(self._used_before)))]
        fresh = range(self._next, self._next + count - len(taken))
        self._next = fresh.stop
        return [*taken, *fresh]

    @torch.inference_mode()
    def give_back(self, blocks: Sequence[int]) -> None:
        """They are free, and of zeros."""
        for store in self._stores.values():
            store.clear(blocks)
        self._used_before += sorted(blocks, reverse=True)

    def stores(self) -> list[Tensor]:
        """What was made by `store`."""
        return [store.tensor for store in self._stores.values()]

    def store(self, heads: int, d: int, *, like: Tensor | None = None) -> Tensor:
        """The blocks (n, 2, heads, BLOCK, d) of layers with so many key heads of size d: keys, then values.

        Layers of another shape have the same blocks in memory of their own. The first time it is made `like`
        some tensor; without one it has to be there.
        """
        if (heads, d) not in self._stores and like is not None:
            self._stores[heads, d] = _Store((self.count + _OWN, 2, heads, BLOCK, d), like)
        return self._stores[heads, d].tensor


class _Store:
    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        numbers = shape[1] * shape[2] * shape[3] * shape[4]
        self.size = numbers * like.element_size()
        self._map: mmap.mmap | None = None
        if like.device.type == "cpu" and sys.platform == "linux" and self.size % _PAGE == 0:
            self._map = mmap.mmap(-1, shape[0] * self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # so that a block takes its own memory and no more
            self.tensor = torch.frombuffer(self._map, dtype=like.dtype).view(shape)
        else:
            self.tensor = like.new_zeros(shape)

    def clear(self, blocks: Sequence[int]) -> None:
        if self._map is None:
            self.tensor[torch.tensor(blocks, device=self.tensor.device)] = 0
            return
        for start, count in _runs(blocks):
            self._map.madvise(mmap.MADV_DONTNEED, start * self.size, count * self.size)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks that lie side by side."""
    ordered = sorted(blocks)
    start = 0
    for place, (here, following) in enumerate(zip(ordered, islice([*ordered, -1], 1, None), strict=False)):
        if following != here + 1:
            yield ordered[start], place + 1 - start
            start = place + 1
