"""Routing: what every row of a batch adds to a layer's output. The tensor core of multi-adapter serving.

One batch may mix rows of one or several bundles, in shared-basis form (y = Wx + U P_user Q_user V^T x) or by
pairs (y = Wx + B A x), rows of plain LoRA adapters and rows of the base model. Resolving names to slots
belongs to `soppu.serve.bank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.errors import UnsupportedModel
from soppu.serve.slots import BundleSlot, ModuleFactors, PairSlot, SharedFactors, Slot


@dataclass(frozen=True, eq=False)
class SharedChange:
    """What m rows of one cluster of one bundle add at one module; `rows` is None for the whole batch."""

    rows: Tensor | None
    U: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (m, T, i) -> x V Q^T P^T U^T (m, T, o). O(m T (i k_in + c (k_in + k_out) + o k_out))."""
        t = x @ self.V
        if self.Q is not None:
            t = torch.bmm(t, self.Q.mT)
        return torch.bmm(t, self.P.mT) @ self.U.mT


@dataclass(frozen=True, eq=False)
class PairChange:
    """What m rows of LoRA pairs add at one module: A (m, R, i), B (m, o, R), padded with zeros to rank R."""

    rows: Tensor | None
    A: Tensor
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (m, T, i) -> x A^T B^T (m, T, o). O(m T R (i + o))."""
        return torch.bmm(torch.bmm(x, self.A.mT), self.B.mT)


Change = SharedChange | PairChange


class Routing:
    """Which slot every row of a batch goes to; None is the base model.

    The factors of a module are gathered once for a routing and reused by every decoding step, so make a
    new routing only when rows leave or join.
    """

    def __init__(self, slots: Sequence[Slot | None]) -> None:
        self.rows = len(slots)
        self._bundles: dict[int, list[tuple[int, BundleSlot]]] = {}
        self._pairs: list[tuple[int, PairSlot]] = []
        for row, slot in enumerate(slots):
            if isinstance(slot, BundleSlot):
                self._bundles.setdefault(id(slot.modules), []).append((row, slot))
            elif isinstance(slot, PairSlot):
                self._pairs.append((row, slot))
        self._changes: dict[str, tuple[Change, ...]] = {}

    def changes(self, module: str) -> tuple[Change, ...]:
        """The changes of one module: at most one for each cluster of each bundle, and one for all pairs."""
        if module not in self._changes:
            self._changes[module] = tuple(self._gather(module))
        return self._changes[module]

    def apply(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        """Add this module's changes to the base output `y` (b, T, o), in place; rows of the base stay.

        Args:
            module: full-model module name.
            x: the layer's input (b, T, i), b the rows of this routing.

        Raises:
            UnsupportedModel: the layer's input does not keep the batch as its first dimension.
        """
        changes = self.changes(module)
        if changes and (x.ndim != 3 or x.shape[0] != self.rows):
            raise UnsupportedModel(
                f"{module}: input of shape {tuple(x.shape)} for a batch of {self.rows} rows;"
                " per-row adapters need (rows, tokens, features)"
            )
        for change in changes:
            if change.rows is None:
                y = y.add_(change(x))
            else:
                y = y.index_add_(0, change.rows, change(x[change.rows]))
        return y

    def _gather(self, module: str) -> Iterator[Change]:
        pairs = [(row, slot.pairs[module]) for row, slot in self._pairs if module in slot.pairs]
        for members in self._bundles.values():
            factors = members[0][1].modules.get(module)
            if factors is None:
                continue
            for cluster, here in _places(factors, members).items():
                yield self._shared_change(factors.shared[cluster], here)
            if factors.own is not None:
                found = [(row, factors.own.pair(slot.index)) for row, slot in members]
                pairs += [(row, pair) for row, pair in found if pair is not None]
        if pairs:
            # in the order of rows: where they are the whole batch, no row numbers are kept
            yield self._pair_change(sorted(pairs, key=lambda one: one[0]))

    def _shared_change(self, factors: SharedFactors, members: list[tuple[int, int]]) -> SharedChange:
        index = torch.tensor([place for _, place in members], device=factors.P.device)
        rows = self._rows([row for row, _ in members], factors.P.device)
        Q = None if factors.Q is None else factors.Q[index]
        return SharedChange(rows, U=factors.U, V=factors.V, P=factors.P[index], Q=Q)

    def _pair_change(self, members: list[tuple[int, LoraPair]]) -> PairChange:
        first = members[0][1]
        rank = max(pair.rank for _, pair in members)
        A = first.A.new_zeros(len(members), rank, first.A.shape[1])
        B = first.B.new_zeros(len(members), first.B.shape[0], rank)
        for position, (_, pair) in enumerate(members):
            A[position, : pair.rank] = pair.A
            B[position, :, : pair.rank] = pair.B
        return PairChange(self._rows([row for row, _ in members], first.A.device), A=A, B=B)

    def _rows(self, rows: list[int], device: torch.device) -> Tensor | None:
        return None if len(rows) == self.rows else torch.tensor(rows, device=device)


def _places(
    factors: ModuleFactors, members: Sequence[tuple[int, BundleSlot]]
) -> dict[int, list[tuple[int, int]]]:
    """Cluster -> (row, place in the cluster's cores) of the members served in shared form here."""
    places = factors.place[[slot.index for _, slot in members]].tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for (row, slot), place in zip(members, places, strict=True):
        if place >= 0:
            found.setdefault(slot.cluster, []).append((row, place))
    return found
