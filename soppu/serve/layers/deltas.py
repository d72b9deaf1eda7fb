"""What rows of a batch add to the outputs of layers with one input. Which rows: `layers.routing`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.serve.layers.factors import Bases
from soppu.serve.layers.kernels import Basis, Kernel, Tokens
from soppu.serve.layers.records import Records

_SMALL = 1 << 15  # numbers; below this torch uses one thread, so threads need not be synchronised


@dataclass(frozen=True, eq=False)
class Layers:
    """Linear layers with one input, by full-model name, and their out-features. Outputs lie side by side.

    Compared by identity, as every step looks every one of them up.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def columns(self, number: int) -> slice:
        """The columns of one layer's outputs."""
        start = sum(self.widths[:number])
        return slice(start, start + self.widths[number])


@dataclass(frozen=True, eq=False)
class SharedChange:
    """What m rows of one cluster of one bundle add at M modules that share an input."""

    rows: Tensor | None  # (m,) their places in the batch; None where they are all of it
    bases: Bases  # of the modules
    P: Tensor  # (m, M, k_out, c) cores of the rows, or their left factors; contiguous
    Q: Tensor | None  # (m, M, c, k_in) right factors

    def add(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """Add x V Q^T P^T U^T, x (b tokens, i), to the layers' outputs y (b tokens, o), in place.

        O(m tokens (i k_in + c (k_in + k_out) + o k_out)) a module.
        """
        t = self.bases.V(_pick(x, self.rows, tokens))
        m, M = self.P.shape[:2]
        t = t.view(m, tokens, M, -1).transpose(1, 2)
        if self.Q is not None:
            t = _times(self.Q, t)
        t = _times(self.P, t)
        change = self.bases.U(t.transpose(1, 2).reshape(m * tokens, -1))
        _put(change, y, self.rows, tokens)


@dataclass(frozen=True, eq=False)
class CoreChange:
    """What rows of one cluster add at M modules of one input, by the kernel: `SharedChange` in one pass."""

    rows: Tensor  # (b,) int64 every row's place in the cores; -1 where it has none
    cores: Tensor  # (m + 1, M k_in k_out) cores (k_in, k_out) module by module; the last row is zero
    basis: Basis
    kernel: Kernel
    spread: dict[int, Tensor]  # `rows` by tokens of a row; one for all layers of a routing, filled here

    def add(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """Add to the layers' outputs y; arguments and cost as in `SharedChange.add`."""
        if tokens not in self.spread:
            self.spread[tokens] = self.rows.repeat_interleave(tokens)
        self.kernel(x, y, self.basis, Tokens(self.cores, self.spread[tokens], None))


@dataclass(frozen=True, eq=False)
class PairChange:
    """What m rows of LoRA pairs add at one module: A (m, R, i), B (m, o, R), padded with zeros to rank R.

    `columns` are where the module's outputs are; `rows` as in `SharedChange`.
    """

    rows: Tensor | None
    columns: slice
    A: Tensor
    B: Tensor

    def add(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """Add x A^T B^T to one module's output; arguments as in `SharedChange.add`. O(m tokens R (i + o))."""
        x = _pick(x, self.rows, tokens).view(-1, tokens, x.shape[1])
        change = torch.bmm(torch.bmm(x, self.A.mT), self.B.mT).view(-1, self.B.shape[1])
        _put(change, y[:, self.columns], self.rows, tokens)


@dataclass(frozen=True, eq=False)
class OwnChange:
    """What the records of some rows add at all modules of one input, by the kernel that widens them."""

    users: Tensor  # (b,) int64 every row's record; -1 where it has none
    records: Records
    basis: Basis
    kernel: Kernel
    spread: dict[int, Tokens]  # by tokens of a row; one for all layers of a routing, filled here

    def add(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """Add to the layers' outputs y; arguments as in `SharedChange.add`. O(tokens c (i + o)) a row."""
        if tokens not in self.spread:
            users = self.users.repeat_interleave(tokens)
            none = x.new_zeros(1, 0), torch.full_like(users, -1)
            self.spread[tokens] = Tokens(*none, None, self.records, users)
        self.kernel(x, y, self.basis, self.spread[tokens])


Change = SharedChange | CoreChange | PairChange | OwnChange


def _times(cores: Tensor, t: Tensor) -> Tensor:
    """(m, M, a, b), (m, M, tokens, b) -> (m, M, tokens, a): every row's own cores."""
    if t.shape[2] == 1 and cores.numel() <= _SMALL:
        return (cores * t).sum(-1)[:, :, None]
    m, M, a, b = cores.shape
    return torch.bmm(t.reshape(m * M, -1, b), cores.view(m * M, a, b).mT).view(m, M, -1, a)


def _pick(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """The tokens (m tokens, i) of some rows of x (b tokens, i)."""
    if rows is None:
        return x
    if tokens == 1:
        return x.index_select(0, rows)
    return x.unflatten(0, (-1, tokens)).index_select(0, rows).flatten(0, 1)


def _put(change: Tensor, y: Tensor, rows: Tensor | None, tokens: int) -> None:
    """Add the change (m tokens, o) of some rows to y (b tokens, o)."""
    if rows is None:
        y.add_(change)
    elif tokens == 1:
        y.index_add_(0, rows, change)
    else:
        y.unflatten(0, (-1, tokens)).index_add_(0, rows, change.unflatten(0, (-1, tokens)))
