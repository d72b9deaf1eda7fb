"""Per-row adapters around a frozen linear layer: the tensor core of multi-adapter serving.

One batch may mix rows of one or several bundles (shared-basis form, y = Wx + U S_user V^T x), rows of plain
LoRA adapters (y = Wx + B A x) and rows of the base model. Which row gets what is a `Routing`; resolving
names to slots belongs to `soppu.serve.bank`, generation to `soppu.serve.engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soppu.adapter import LoraPair
from soppu.errors import UnsupportedModel

# model_type -> layers that transformers feeds with (rows * tokens, features).
_FLAT: Mapping[str, tuple[str, ...]] = {"opt": ("fc1", "fc2")}


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """One module of a bundle, ready to serve: U (o, k), V (i, k), P (n, k, c), Q (n, c, k) or None.

    The norm of every user is folded into P, so S_n = P_n @ Q_n (or S_n = P_n where Q is None).
    `present` says who has an adapter at this module at all.
    """

    U: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor | None
    present: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class SharedSlot:
    """One user of one loaded bundle. Holding the slot keeps that version's tensors alive."""

    modules: Mapping[str, SharedFactors]
    index: int


@dataclass(frozen=True, eq=False)
class PairSlot:
    """One loaded LoRA adapter: module name -> (A, B) on the model's device, in its dtype."""

    pairs: Mapping[str, LoraPair]


Slot = SharedSlot | PairSlot


@dataclass(frozen=True, eq=False)
class SharedChange:
    """What m rows of one bundle add at one module; `rows` is None where they are the whole batch."""

    rows: Tensor | None
    U: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (m, T, i) -> x V S^T U^T (m, T, o). O(m T k (i + o + c))."""
        t = x @ self.V
        if self.Q is not None:
            t = torch.bmm(t, self.Q.mT)
        return torch.bmm(t, self.P.mT) @ self.U.mT


@dataclass(frozen=True, eq=False)
class PairChange:
    """What m rows of plain LoRA add at one module: A (m, R, i), B (m, o, R), padded with zeros to rank R."""

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
        self._shared: dict[int, list[tuple[int, SharedSlot]]] = {}
        self._pairs: list[tuple[int, PairSlot]] = []
        for row, slot in enumerate(slots):
            if isinstance(slot, SharedSlot):
                self._shared.setdefault(id(slot.modules), []).append((row, slot))
            elif isinstance(slot, PairSlot):
                self._pairs.append((row, slot))
        self._changes: dict[str, tuple[Change, ...]] = {}

    def changes(self, module: str) -> tuple[Change, ...]:
        """The changes of one module, at most one for each bundle and one for all plain LoRA rows."""
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
        for members in self._shared.values():
            factors = members[0][1].modules.get(module)
            if factors is not None:
                here = [(row, slot.index) for row, slot in members if factors.present[slot.index]]
                if here:
                    yield self._shared_change(factors, here)
        pairs = [(row, slot.pairs[module]) for row, slot in self._pairs if module in slot.pairs]
        if pairs:
            yield self._pair_change(pairs)

    def _shared_change(self, factors: SharedFactors, members: list[tuple[int, int]]) -> SharedChange:
        index = torch.tensor([slot for _, slot in members], device=factors.P.device)
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


class Router:
    """What the adapted layers of one model share: the routing of the forward under way."""

    def __init__(self) -> None:
        self.routing: Routing | None = None

    @contextmanager
    def using(self, routing: Routing) -> Iterator[None]:
        """Route the forwards inside the block. One thread runs forwards; this is not reentrant."""
        self.routing = routing
        try:
            yield
        finally:
            self.routing = None


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` or `Conv1D` plus the change its router asks for, row by row.

    Without a routing it is the base layer, bit for bit. A `flat` layer gets its rows laid end to end,
    (b T, i), as transformers' OPT does it around its MLP; every row then has T tokens.
    """

    def __init__(self, base: nn.Module, *, name: str, router: Router, flat: bool = False) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.flat = flat
        self._router = router

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: model code may look at its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(b, T, i) -> (b, T, o); (b T, i) -> (b T, o) where the layer is flat."""
        y: Tensor = self.base(x)
        routing = self._router.routing
        if routing is None:
            return y
        if self.flat:
            rows = routing.rows
            changed = routing.apply(self.name, x.view(rows, -1, x.shape[-1]), y.view(rows, -1, y.shape[-1]))
            return changed.view(y.shape)
        return routing.apply(self.name, x, y)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every module an adapter may sit on: full name -> (o, i)."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (int(module.nf), int(module.nx))
    return shapes


def install(model: nn.Module, names: Iterable[str], *, router: Router) -> None:
    """Wrap the named layers of `model`; a wrapped one stays. Base weights are not touched."""
    flat = _FLAT.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        if not isinstance(layer, AdaptedLinear):
            setattr(parent, leaf, AdaptedLinear(layer, name=name, router=router, flat=leaf in flat))
