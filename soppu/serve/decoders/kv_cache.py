"""KVCache: keys and values of every running row, which never move. Not for scheduling: `batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_FIRST_LENGTH = 256


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward runs: T tokens each of b rows."""

    ids: Tensor  # (b, T) int64; a row with fewer tokens than T is padded at its end
    rows: Sequence[int]  # b different rows of the cache, ascending
    starts: Sequence[int]  # how many tokens of each row the cache holds already
    counts: Sequence[int]  # how many of the T tokens are the row's own
    every: bool = False  # logits are wanted after each of the b T tokens, not after every row's last

    @property
    def fresh(self) -> bool:
        """True where no row has tokens in the cache, so that the new tokens attend only to each other."""
        return not any(self.starts)

    @cached_property
    def positions(self) -> Tensor:
        """(b, T) int64 place of every token in its row."""
        starts = torch.tensor(self.starts, device=self.ids.device)
        return starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    @cached_property
    def last(self) -> Tensor:
        """(b,) int64: where each row's last own token is among the b T tokens."""
        width = self.ids.shape[1]
        ends = [row * width + count - 1 for row, count in enumerate(self.counts)]
        return torch.tensor(ends, device=self.ids.device)

    @cached_property
    def gaps(self) -> Tensor | None:
        """(b,) int64 places of the rows in what `KVCache.read` gives; None where they are all of it."""
        first, last = self.rows[0], self.rows[-1]
        if last - first + 1 == len(self.rows):
            return None
        return torch.tensor([row - first for row in self.rows], device=self.ids.device)

    @property
    def seen(self) -> int:
        """Positions of the cache that some row of this step may attend to."""
        return self.ids.shape[1] if self.fresh else max(self.starts) + self.ids.shape[1]

    def mask(self, dtype: torch.dtype, *, window: int = 0) -> Tensor:
        """(b, T, seen) to add to scores: 0 where a token may attend, the smallest `dtype` has where not.

        A token sees itself and the `window` - 1 before it; with 0 it sees all.
        """
        keys = torch.arange(self.seen, device=self.ids.device)
        distance = self.positions[:, :, None] - keys
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )


@dataclass(eq=False)
class KVCache:
    """Keys and values of `rows` rows in tensors made once, one a layer: (2, rows, heads, length, d).

    The length doubles when a row needs more, up to `limit`; only then is anything copied. A row's
    next request never attends to what the last one left, but NaN and infinity have to be `clear`ed: the
    attention weight 0 does not silence them.
    """

    rows: int
    limit: int
    length: int = 0
    layers: dict[int, Tensor] = field(default_factory=dict)
    _index: tuple[Step, dict[int, Tensor]] | None = None

    def write(self, layer: int, step: Step, kv: Tensor) -> None:
        """Store keys and values (b, T, 2, heads, d) of the step's tokens."""
        self._reserve(step)
        heads, d = kv.shape[3:]
        if layer not in self.layers:
            self.layers[layer] = kv.new_zeros(2, self.rows, heads, self.length, d)
        self.layers[layer].view(-1, d).index_copy_(0, self._places(step, heads), kv.reshape(-1, d))

    def read(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, seen, d) of the rows from the step's first to its last.

        No copy. Where rows in between are not the step's, they are there too; see `Step.gaps`.
        """
        here = self.layers[layer][:, step.rows[0] : step.rows[-1] + 1, :, : step.seen]
        return here[0], here[1]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a row."""
        for layer in self.layers.values():
            layer[:, row].zero_()

    def _reserve(self, step: Step) -> None:
        if step.seen <= self.length:
            return
        length = max(self.length, min(_FIRST_LENGTH, self.limit))
        while length < step.seen:
            length = min(2 * length, max(self.limit, step.seen))
        for number, old in self.layers.items():
            new = old.new_zeros(*old.shape[:3], length, old.shape[4])
            new[:, :, :, : self.length] = old
            self.layers[number] = new
        self.length = length
        self._index = None

    def _places(self, step: Step, heads: int) -> Tensor:
        """(b T 2 heads,) row numbers in a layer laid out as rows of d, made once for all layers of a step."""
        if self._index is None or self._index[0] is not step:
            self._index = (step, {})
        places = self._index[1]
        if heads not in places:
            device = step.ids.device
            rows = torch.tensor(step.rows, device=device)[:, None, None, None]
            pair = torch.arange(2, device=device)[:, None] * self.rows
            heads_of = (rows + pair) * heads + torch.arange(heads, device=device)
            places[heads] = (heads_of * self.length + step.positions[:, :, None, None]).view(-1)
        return places[heads]
