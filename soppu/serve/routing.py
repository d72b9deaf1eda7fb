"""Routing: which adapter every row of a batch goes to, gathered for the layers. The heart of multi-adapter serving.

One batch may mix rows of one or several bundles, in shared-basis form (y = Wx + U P_user Q_user V^T x) or by
pairs (y = Wx + B A x), rows of plain LoRA adapters and rows of the base model. Resolving names to slots
belongs to `soppu.serve.bank`, the products to `soppu.serve.changes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.serve.changes import Change, PairChange, SharedChange
from soppu.serve.slots import BundleSlot, ModuleFactors, PairSlot, SharedFactors, Slot, Stack

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
        self._changes: dict[tuple[str, ...], tuple[Change, ...]] = {}
        self._places: dict[tuple[int, int], dict[int, Places]] = {}
        self._cores: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._numbers: dict[int, Tensor | None] = {}

    @property
    def is_base(self) -> bool:
        """True where every row is the base model's."""
        return not self._bundles and not self._pairs

    def changes(self, *modules: str) -> tuple[Change, ...]:
        """The changes of modules that share an input.

        For each of them at most one for each cluster of each bundle, and one for all pairs; modules whose cores
        are in one stack have theirs in common.
        """
        if modules not in self._changes:
            self._changes[modules] = () if self.is_base else tuple(self._gather(modules))
        return self._changes[modules]

    def apply(self, modules: tuple[str, ...], x: Tensor, ys: Sequence[Tensor]) -> None:
        """Add the changes of modules that share an input to their outputs, in place; rows of the base stay.

        Args:
            modules: full-model module names.
            x: their input (b T, i), b the rows of this routing, every row's T tokens together.
            ys: the output (b T, o) of each.
        """
        for change in self.changes(*modules):
            change.add(x, ys, x.shape[0] // self.rows)

    def _gather(self, modules: tuple[str, ...]) -> Iterator[Change]:
        pairs: dict[int, list[tuple[int, LoraPair]]] = {}
        for number, module in enumerate(modules):
            found = [(row, slot.pairs[module]) for row, slot in self._pairs if module in slot.pairs]
            pairs[number] = found
        for members in self._bundles.values():
            factors = {n: f for n, m in enumerate(modules) if (f := members[0][1].modules.get(m)) is not None}
            yield from self._shared(factors, members)
            for number, one in factors.items():
                if one.own is not None:
                    owned = [(row, one.own.pair(slot.index)) for row, slot in members]
                    pairs[number] += [(row, pair) for row, pair in owned if pair is not None]
        for number, found in pairs.items():
            if found:
                # in the order of rows: where they are the whole batch, no row numbers are kept
                yield self._pair_change(number, sorted(found, key=lambda one: one[0]))

    def _shared(
        self, factors: dict[int, ModuleFactors], members: list[tuple[int, BundleSlot]]
    ) -> Iterator[SharedChange]:
        """Parts of one stack together, others one by one."""
        parts: dict[int, tuple[Places, list[tuple[int, SharedFactors]]]] = {}
        for number, one in factors.items():
            for cluster, here in self._clusters(one, members).items():
                shared = one.shared[cluster]
                parts.setdefault(id(shared.stack or shared), (here, []))[1].append((number, shared))
        for here, found in parts.values():
            yield self._shared_change(here, found)

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

    def _shared_change(self, here: Places, found: list[tuple[int, SharedFactors]]) -> SharedChange:
        shared = [one for _, one in found]
        first = shared[0]
        if first.stack is None:
            index = _index([place for _, place in here], first.P)
            P, Q = first.P[index][None], None if first.Q is None else first.Q[index][None]
            V = first.V
        else:
            P, Q = self._stacked(first.stack, here)
            V = first.stack.V(shared)
            P, Q = _part(P, shared), None if Q is None else _part(Q, shared)
        rows = self._rows(here, first.P)
        return SharedChange(rows, [number for number, _ in found], U=[one.U for one in shared], V=V, P=P, Q=Q)

    def _stacked(self, stack: Stack, here: Places) -> tuple[Tensor, Tensor | None]:
        """The rows' cores at all modules of a stack, gathered once."""
        if id(stack) not in self._cores:
            index = _index([place for _, place in here], stack.P)
            Q = None if stack.Q is None else stack.Q.index_select(1, index)
            self._cores[id(stack)] = stack.P.index_select(1, index), Q
        return self._cores[id(stack)]

    def _pair_change(self, number: int, members: list[tuple[int, LoraPair]]) -> PairChange:
        pairs = [pair for _, pair in members]
        rows = None if len(pairs) == self.rows else _index([row for row, _ in members], pairs[0].A)
        rank = max(pair.rank for pair in pairs)
        if all(pair.rank == rank for pair in pairs):
            A, B = torch.stack([pair.A for pair in pairs]), torch.stack([pair.B for pair in pairs])
            return PairChange(rows, number, A=A, B=B)
        A = pairs[0].A.new_zeros(len(pairs), rank, pairs[0].A.shape[1])
        B = pairs[0].B.new_zeros(len(pairs), pairs[0].B.shape[0], rank)
        for position, pair in enumerate(pairs):
            A[position, : pair.rank] = pair.A
            B[position, :, : pair.rank] = pair.B
        return PairChange(rows, number, A=A, B=B)

    def _rows(self, here: Places, like: Tensor) -> Tensor | None:
        """Of places kept in this routing; made once for all modules that share them."""
        if len(here) == self.rows:
            return None
        if id(here) not in self._numbers:
            self._numbers[id(here)] = _index([row for row, _ in here], like)
        return self._numbers[id(here)]


def _index(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


def _part(cores: Tensor, shared: Sequence[SharedFactors]) -> Tensor:
    """The cores (M, m, ...) of some modules of a stack; neighbours without a copy."""
    numbers = [one.number for one in shared]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return cores[numbers[0] : numbers[0] + len(numbers)]
    return cores[numbers]
