"""Routing: which adapter every row of a batch goes to.

One batch may mix rows of one or several bundles, in shared-basis form (y = Wx + U P_user Q_user V^T x) or by
records of own numbers (widened into pairs, y = Wx + B A x, where no kernel reads them), rows of plain LoRA
adapters and rows of the base model. Resolving names to slots belongs to `soppu.serve.bank.bank`, the products
to `soppu.serve.layers.deltas`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soppu.adapter import LoraPair
from soppu.serve.layers.deltas import Change, CoreChange, Layers, OwnChange, PairChange, SharedChange
from soppu.serve.layers.factors import (
    Bases,
    BundleSlot,
    ModuleFactors,
    OwnNumbers,
    PairSlot,
    SharedFactors,
    Slot,
    Stack,
)
from soppu.serve.layers.frame import Frame, Members
from soppu.serve.layers.kernels import Basis, Kernel, Sides, Tokens
from soppu.serve.layers.packed_linear import PackedLinear
from soppu.serve.layers.records import Records

Places = list[tuple[int, int]]  # (row of the batch, place in the cores)
Recorded = tuple[Tensor, dict[int, Tokens]]  # `OwnChange.users` and `OwnChange.spread`


class Routing:
    """Which slot every row of a batch goes to; None is the base model.

    A layer's factors are gathered once for a routing and used again by every decoding step, so make a new
    routing only when rows leave or join.
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
        for key, members in self._bundles.items():
            if isinstance(modules := members[0][1].modules, Frame):
                self._bundles[key] = modules.beside(members)
        some = [members[0][1].modules for members in self._bundles.values()]
        self._touched = frozenset().union(*some, *(slot.pairs for _, slot in self._pairs))
        self._changes: dict[Layers, tuple[Change, ...]] = {}
        self._places: dict[tuple[int, int], dict[int, Places]] = {}
        self._cores: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._numbers: dict[int, Tensor | None] = {}
        self._recorded: dict[tuple[int, int], dict[int, Recorded]] = {}
        self._spread: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}  # `CoreChange.rows` and its `spread`

    def changes(self, layers: Layers) -> tuple[Change, ...]:
        """The changes of layers that share an input: by module or stack and cluster, and one of all pairs."""
        found = self._changes.get(layers)
        if found is None:
            untouched = self._touched.isdisjoint(layers.names)
            found = self._changes[layers] = () if untouched else tuple(self._gather(layers))
        return found

    def apply(self, layers: Layers, x: Tensor, y: Tensor) -> None:
        """Add the changes of layers to their outputs y (b T, o), in place; rows of the base stay.

        Their input x is (b T, i), b the rows of this routing, every row's T tokens together.
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
            owned = {number: held.own for number, held in factors.items() if held.own is not None}
            if kernel := next((own.kernel for own in owned.values()), None):
                yield from self._own(layers, owned, members, kernel)
                continue
            for number, own in owned.items():
                wide = [(row, own.pair(slot.index, slot.cluster)) for row, slot in members]
                pairs[number] += [(row, pair) for row, pair in wide if pair is not None]
        for number, here in pairs.items():
            if here:
                # in the order of rows: where they are the whole batch, no row numbers are kept
                yield self._pair_change(layers.columns(number), sorted(here, key=lambda member: member[0]))

    def _own(
        self, layers: Layers, owned: dict[int, OwnNumbers], members: Members, kernel: Kernel
    ) -> Iterator[OwnChange]:
        """One change for the records of a cluster's rows at all of the layers."""
        first = next(iter(owned.values()))
        for cluster, (users, spread) in self._users(first.records, members).items():
            key = layers, cluster, *owned
            if key not in first.together:
                none: Sides = None, None
                parts = [(n, own.bases.get(cluster, none), own.module) for n, own in owned.items()]
                like = first.like.new_zeros(first.records.shapes[first.module][1], 0)
                first.together[key] = _basis(layers, parts, like)
            yield OwnChange(users, first.records, first.together[key], kernel, spread)

    def _users(self, records: Records, members: Members) -> dict[int, Recorded]:
        """Cluster -> whose records its rows use; made once for all layers, as is what becomes of it."""
        key = id(records), id(members)
        if key not in self._recorded:
            indices = torch.tensor([slot.index for _, slot in members])
            holds = (records.starts[indices + 1] > records.starts[indices]).tolist()
            users = dict[int, list[int]]()
            for (row, slot), some in zip(members, holds, strict=True):
                if some:
                    users.setdefault(slot.cluster, [-1] * self.rows)[row] = slot.index
            self._recorded[key] = {cluster: (torch.tensor(here), {}) for cluster, here in users.items()}
        return self._recorded[key]

    def _shared(
        self, layers: Layers, factors: dict[int, ModuleFactors], members: Members
    ) -> Iterator[SharedChange | CoreChange]:
        """One change for the parts of a stack, one for each factor that is in none."""
        parts: dict[int, tuple[Places, list[tuple[int, SharedFactors]]]] = {}
        for number, module in factors.items():
            for cluster, here in self._clusters(module, members).items():
                shared = module.shared[cluster]
                parts.setdefault(id(shared.stack or shared), (here, []))[1].append((number, shared))
        for here, numbered in parts.values():
            stack = numbered[0][1].stack
            if stack is not None and stack.kernel is not None and stack.Q is None:
                yield self._core_change(layers, stack, here, numbered)
            else:
                yield self._shared_change(layers, here, numbered)

    def _clusters(self, factors: ModuleFactors, members: Members) -> dict[int, Places]:
        """Cluster -> rows of the members served in shared form here; once for modules of the same places."""
        key = id(factors.place), id(members)
        if key not in self._places:
            places = factors.place[[slot.index for _, slot in members]].tolist()
            clusters = self._places[key] = {}
            for (row, slot), place in zip(members, places, strict=True):
                if place >= 0:
                    clusters.setdefault(slot.cluster, []).append((row, place))
        return self._places[key]

    def _shared_change(
        self, layers: Layers, here: Places, numbered: list[tuple[int, SharedFactors]]
    ) -> SharedChange:
        shared = [factors for _, factors in numbered]
        stack, first = shared[0].stack, shared[0]
        if stack is None:
            index = _index([place for _, place in here], first.P)
            P, Q = first.P[index][:, None], None if first.Q is None else first.Q[index][:, None]
            return SharedChange(self._rows(here, first.P), _bases(layers, numbered), P=P, Q=Q)
        key = layers, *(number for number, _ in numbered)
        if key not in stack.bases:
            stack.bases[key] = _bases(layers, numbered)
        cores = [None if side is None else _part(side, shared) for side in self._stacked(stack, here)]
        assert cores[0] is not None
        return SharedChange(self._rows(here, first.P), stack.bases[key], P=cores[0], Q=cores[1])

    def _core_change(
        self, layers: Layers, stack: Stack, here: Places, numbered: list[tuple[int, SharedFactors]]
    ) -> CoreChange:
        key = layers, *(number for number, _ in numbered)
        if key not in stack.together:
            parts = [(number, (factors.U, factors.V), -1) for number, factors in numbered]
            stack.together[key] = _basis(layers, parts, numbered[0][1].V[:, :0])
        if id(here) not in self._spread:
            rows = torch.full((self.rows,), -1)
            rows[[row for row, _ in here]] = torch.arange(len(here))
            self._spread[id(here)] = rows, {}
        P = _part(self._stacked(stack, here)[0], [factors for _, factors in numbered])
        table = P.new_zeros(len(here) + 1, P[0].numel())
        table[:-1].view_as(P.mT).copy_(P.mT)
        rows, spread = self._spread[id(here)]
        assert stack.kernel is not None
        return CoreChange(rows, table, stack.together[key], stack.kernel, spread)

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
        A = pad_sequence([pair.A for pair in pairs], batch_first=True)
        B = pad_sequence([pair.B.mT for pair in pairs], batch_first=True).mT
        return PairChange(rows, columns, A=A, B=B)

    def _rows(self, here: Places, like: Tensor) -> Tensor | None:
        """The row numbers of places kept in this routing; made once for all modules that share them."""
        if len(here) == self.rows:
            return None
        if id(here) not in self._numbers:
            self._numbers[id(here)] = _index([row for row, _ in here], like)
        return self._numbers[id(here)]


def _index(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


def _bases(layers: Layers, numbered: Sequence[tuple[int, SharedFactors]]) -> Bases:
    """The bases of some modules of one input as two products, each once for all of them."""
    V = torch.cat([factors.V for _, factors in numbered], dim=1)
    U = V.new_zeros(sum(layers.widths), sum(factors.U.shape[1] for _, factors in numbered))
    start = 0
    for number, factors in numbered:
        end = start + factors.U.shape[1]
        U[layers.columns(number), start:end] = factors.U
        start = end
    return Bases(V=PackedLinear(V.mT.contiguous()), U=PackedLinear(U))


def _basis(layers: Layers, parts: Sequence[tuple[int, Sides, int]], like: Tensor) -> Basis:
    """The bases of some modules of one input as the kernel reads them, beside each other.

    A part is the layer's number, its sides, and the module's number in the records, -1 where it is in none.
    """
    columns = [layers.columns(number) for number, _, _ in parts]
    spans = [
        (at.start, at.stop - at.start, module) for at, (_, _, module) in zip(columns, parts, strict=True)
    ]
    return Basis.of([sides for _, sides, _ in parts], spans, like=like)


def _part(cores: Tensor, shared: Sequence[SharedFactors]) -> Tensor:
    """The cores (M, m, ...) of some modules of a stack as (m, M, ...)."""
    return torch.stack([cores[factors.number] for factors in shared], dim=1)
