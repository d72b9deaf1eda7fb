"""Routing: which adapter every row of a batch goes to. The heart of multi-adapter serving.

One batch may mix rows of one or several bundles, in shared-basis form (y = Wx + U P_user Q_user V^T x) or by
pairs (y = Wx + B A x), rows of plain LoRA adapters and rows of the base model. Resolving names to slots
belongs to `soppu.serve.bank.bank`, the products to `soppu.serve.layers.deltas`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.serve.layers.deltas import Change, Layers, PairChange, SharedChange
from soppu.serve.layers.factors import Bases, BundleSlot, ModuleFactors, PairSlot, SharedFactors, Slot, Stack
from soppu.serve.layers.packed_linear import PackedLinear

Places = list[tuple[int, int]]  # (row of the batch, place in the cores)


class Routing:
    """Which slot every row of a batch goes to; None is the base model.

    The factors of a layer are gathered once for a routing and reused by every decoding step, so make a
    new routing only when rows leave or join. Gathering a bundle whose users all have their cores in stacks is
    one copy of the rows' cores for all modules.
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
        self._changes: dict[Layers, tuple[Change, ...]] = {}
        self._places: dict[tuple[int, int], dict[int, Places]] = {}
        self._cores: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._numbers: dict[int, Tensor | None] = {}

    @property
    def is_base(self) -> bool:
        """True where every row is the base model's."""
        return not self._bundles and not self._pairs

    def changes(self, layers: Layers) -> tuple[Change, ...]:
        """The changes of layers that share an input.

        For each of them at most one for each cluster of each bundle, and one for all pairs; layers whose
        cores are in one stack have theirs in common.
        """
        if layers not in self._changes:
            self._changes[layers] = () if self.is_base else tuple(self._gather(layers))
        return self._changes[layers]

    def apply(self, layers: Layers, x: Tensor, y: Tensor) -> None:
        """Add the changes of layers to their outputs, in place; rows of the base stay.

        Args:
            layers: those whose input is x.
            x: (b T, i), b the rows of this routing, every row's T tokens together.
            y: (b T, o) the outputs of all of them.
        """
        for change in self.changes(layers):
            change.add(x, y, x.shape[0] // self.rows)

    def _gather(self, layers: Layers) -> Iterator[Change]:
        pairs: dict[int, list[tuple[int, LoraPair]]] = {}
        for number, module in enumerate(layers.names):
            pairs[number] = [(row, slot.pairs[module]) for row, slot in self._pairs if module in slot.pairs]
        for members in self._bundles.values():
            modules = members[0][1].modules
            factors = {n: modules[name] for n, name in enumerate(layers.names) if name in modules}
            yield from self._shared(layers, factors, members)
            for number, one in factors.items():
                if one.own is not None:
                    owned = [(row, one.own.pair(slot.index)) for row, slot in members]
                    pairs[number] += [(row, pair) for row, pair in owned if pair is not None]
        for number, found in pairs.items():
            if found:
                # in the order of rows: where they are the whole batch, no row numbers are kept
                yield self._pair_change(layers.columns(number), sorted(found, key=lambda one: one[0]))

    def _shared(
        self, layers: Layers, factors: dict[int, ModuleFactors], members: list[tuple[int, BundleSlot]]
    ) -> Iterator[SharedChange]:
        """Parts of one stack together, others one by one."""
        parts: dict[int, tuple[Places, list[tuple[int, SharedFactors]]]] = {}
        for number, one in factors.items():
            for cluster, here in self._clusters(one, members).items():
                shared = one.shared[cluster]
                parts.setdefault(id(shared.stack or shared), (here, []))[1].append((number, shared))
        for here, found in parts.values():
            yield self._shared_change(layers, here, found)

    def _clusters(self, factors: ModuleFactors, members: list[tuple[int, BundleSlot]]) -> dict[int, Places]:
        """Cluster -> rows of the members served in shared form here; reckoned once for modules that agree."""
        key = id(factors.place), id(members)
        if key not in self._places:
            places = factors.place[[slot.index for _, slot in members]].tolist()
            found = self._places[key] = {}
            for (row, slot), place in zip(members, places, strict=True):
                if place >= 0:
                    found.setdefault(slot.cluster, []).append((row, place))
        return self._places[key]

    def _shared_change(
        self, layers: Layers, here: Places, found: list[tuple[int, SharedFactors]]
    ) -> SharedChange:
        shared = [one for _, one in found]
        stack, first = shared[0].stack, shared[0]
        if stack is None:
            index = _index([place for _, place in here], first.P)
            P, Q = first.P[index][:, None], None if first.Q is None else first.Q[index][:, None]
            return SharedChange(self._rows(here, first.P), _bases(layers, found), P=P, Q=Q)
        key = layers, *(number for number, _ in found)
        if key not in stack.bases:
            stack.bases[key] = _bases(layers, found)
        cores = [None if one is None else _part(one, shared) for one in self._stacked(stack, here)]
        assert cores[0] is not None
        return SharedChange(self._rows(here, first.P), stack.bases[key], P=cores[0], Q=cores[1])

    def _stacked(self, stack: Stack, here: Places) -> tuple[Tensor, Tensor | None]:
        """The rows' cores at all modules of a stack, gathered once."""
        if id(stack) not in self._cores:
            index = _index([place for _, place in here], stack.P)
            Q = None if stack.Q is None else stack.Q.index_select(1, index)
            self._cores[id(stack)] = stack.P.index_select(1, index), Q
        return self._cores[id(stack)]

    def _pair_change(self, columns: slice, members: list[tuple[int, LoraPair]]) -> PairChange:
        pairs = [pair for _, pair in members]
        rows = None if len(pairs) == self.rows else _index([row for row, _ in members], pairs[0].A)
        rank = max(pair.rank for pair in pairs)
        if all(pair.rank == rank for pair in pairs):
            A, B = torch.stack([pair.A for pair in pairs]), torch.stack([pair.B for pair in pairs])
            return PairChange(rows, columns, A=A, B=B)
        A = pairs[0].A.new_zeros(len(pairs), rank, pairs[0].A.shape[1])
        B = pairs[0].B.new_zeros(len(pairs), pairs[0].B.shape[0], rank)
        for position, pair in enumerate(pairs):
            A[position, : pair.rank] = pair.A
            B[position, :, : pair.rank] = pair.B
        return PairChange(rows, columns, A=A, B=B)

    def _rows(self, here: Places, like: Tensor) -> Tensor | None:
        """Of places kept in this routing; made once for all modules that share them."""
        if len(here) == self.rows:
            return None
        if id(here) not in self._numbers:
            self._numbers[id(here)] = _index([row for row, _ in here], like)
        return self._numbers[id(here)]


def _index(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


def _bases(layers: Layers, found: Sequence[tuple[int, SharedFactors]]) -> Bases:
    """The bases of some modules of one input as two products, each once for all of them."""
    V = torch.cat([one.V for _, one in found], dim=1)
    U = V.new_zeros(sum(layers.widths), sum(one.U.shape[1] for _, one in found))
    start = 0
    for number, one in found:
        end = start + one.U.shape[1]
        U[layers.columns(number), start:end] = one.U
        start = end
    return Bases(V=PackedLinear(V.mT.contiguous()), U=PackedLinear(U))


def _part(cores: Tensor, shared: Sequence[SharedFactors]) -> Tensor:
    """The cores (M, m, ...) of some modules of a stack as (m, M, ...)."""
    return torch.stack([cores[one.number] for one in shared], dim=1)
