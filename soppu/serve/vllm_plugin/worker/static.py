"""StaticStep: what `step.Step` does, for engines that record a pass once and replay it, as CUDA graphs do.

What a recorded pass reads must stay in place, whoever is in the batch. So a layer's bases lie in one tensor,
the cores and own numbers of every request's user are copied before the pass, and each token reads the number
of its copy and the place of its basis from buffers. Tokens of the base model read copy 0, all zeros. A copy
stays as long as its user is in the batch. Own numbers are copied as bytes, and widened where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soppu.errors import BundleError
from soppu.serve.bank.resident import DEFAULT_RESIDENT
from soppu.serve.layers import records
from soppu.serve.layers.kernels import CHUNK
from soppu.serve.vllm_plugin.worker.resident import Linear, Resident, Row
from soppu.serve.vllm_plugin.worker.step import Residents

_COUNTS = (
    0,
    4,
    8,
    16,
    32,
    64,
)  # components there is room for at a module; beyond, multiples of the last
_WIDENED = 1 << 26  # numbers of users that are widened at a time


@dataclass(frozen=True)
class Limits:
    """Sizes of the buffers: tokens and requests in one pass, bases of all bundles together."""

    tokens: int
    requests: int
    bases: int


@dataclass(frozen=True, eq=False)
class _Own:
    """The copies of c components at each of m modules of a layer; scales are 0 where there are none."""

    q: Tensor  # (copies, m c, i) int8, or the layer's type where a bundle keeps floats
    p: tuple[Tensor, ...]  # of every part (copies, c, size)
    right: Tensor  # (copies, m c) float32 scales of q
    left: Tensor  # (copies, m c) float32
    b: Tensor  # (copies, m c, k_in) coordinates
    a: Tensor  # (copies, m c, k_out)

    def clear(self, copy: int) -> None:
        for scale in (self.right, self.left, self.b, self.a):
            scale[copy] = 0

    def fill(self, copy: int, number: int, part: records.Part) -> None:
        """What a user has at part `number` of the layer."""
        c = len(self.p[number][copy])
        rows = slice(number * c, number * c + len(part.left))
        self.q[copy, rows], self.p[number][copy, : len(part.left)] = part.q, part.p
        self.right[copy, rows], self.left[copy, rows] = part.right, part.left
        self.b[copy, rows, : part.b.shape[1]], self.a[copy, rows, : part.a.shape[1]] = part.b, part.a


@dataclass(frozen=True, eq=False)
class _Layer:
    """V (i, bases, m, k_in); U of every part (bases, k_out, size); where the cores begin in a copy."""

    V: Tensor
    U: tuple[Tensor, ...]
    at: tuple[int, ...]
    offset: int
    own: _Own | None  # None where nobody had own numbers at the start

    @property
    def components(self) -> int:
        """How many components of a user there is room for at each part."""
        return self.own.p[0].shape[1] if self.own else 0


class StaticStep(Residents):
    """Same methods as `Step`. Bundles are built with the ranks of the first: see `resident.Form.ranks`.

    There is room for what any of `residents`, those served from the start, needs.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        residents: Sequence[Resident],
        limits: Limits,
        *,
        limit: int = DEFAULT_RESIDENT,
    ) -> None:
        super().__init__(linears, limit=limit)
        self._limits = limits
        self._layers = [_layer(line, residents, limits) for line in linears]
        like = residents[0].like
        self._copies = like.new_zeros(limits.requests + 1, len(like))
        self._copy = torch.zeros(limits.tokens, dtype=torch.int64, device=like.device)
        self._base = torch.arange(limits.tokens, device=like.device) * limits.bases
        self._places: dict[tuple[int, int], int] = {}  # (first row, cluster) -> place of the basis
        self._held: dict[int, int] = {}  # row -> its copy
        for resident in residents:
            self.add(resident)

    def add(self, resident: Resident) -> None:
        """Serve this bundle's rows from the next pass on. BundleError where its bases find no place."""
        clusters = len(next(iter(resident.bases.values()))) if resident.bases else 0
        free = sorted(set(range(self._limits.bases)) - set(self._places.values()))
        if clusters > len(free):
            raise BundleError(
                f"{clusters} bases are needed, {len(free)} of {self._limits.bases} are free;"
                " drop a bundle first"
            )
        for linear, layer in zip(self.linears, self._layers, strict=True):
            _check_room(linear, layer, resident)
        for cluster, place in zip(range(clusters), free, strict=False):
            self._places[resident.start, cluster] = place
            for linear, layer in zip(self.linears, self._layers, strict=True):
                basis = resident.bases[linear.name][cluster]
                layer.V[:, place] = basis.V.view(layer.V[:, place].shape)
                for held, (_, U) in zip(layer.U, basis.outputs(), strict=True):
                    held[place] = U
        super().add(resident)

    def exchange(self, resident: Resident) -> None:
        """As `Residents.exchange`. BundleError where there is no room for what is new."""
        for linear, layer in zip(self.linears, self._layers, strict=True):
            _check_room(linear, layer, resident)
        super().exchange(resident)

    def drop(self, start: int) -> None:
        """As `Residents.drop`; the places of its bases are free again."""
        super().drop(start)
        self._places = {key: place for key, place in self._places.items() if key[0] != start}

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        super().clear()
        self._copy.zero_()
        self._held = {}

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Copy what newcomers have, and write every token's copy and basis to the buffers."""
        users, which = np.unique(rows, return_inverse=True)
        self._held = {row: copy for row, copy in self._held.items() if row in users}
        free = iter(sorted(set(range(1, self._limits.requests + 1)) - set(self._held.values())))
        copies, places = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
        for number, row in enumerate(users.tolist()):
            if row:
                resident, use = self._uses[row]
                if row not in self._held:
                    self._held[row] = next(free)
                    self._fill(resident, use.row, self._held[row])
                copies[number] = self._held[row]
                places[number] = self._places[resident.start, use.row.cluster]
        tokens, bases, device = int(counts.sum()), self._limits.bases, self._copy.device
        self._copy[:tokens] = torch.from_numpy(np.repeat(copies[which], counts)).to(device)
        self._copy[tokens:] = 0  # a replayed pass may be longer than the batch
        where = np.arange(tokens) * bases + np.repeat(places[which], counts)
        self._base[:tokens] = torch.from_numpy(where).to(device)

    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """See `Residents.apply`."""
        layer = self._layers[number]
        widest = layer.own.q[0].numel() + sum(p[0].numel() for p in layer.own.p) if layer.own else 1
        chunk = min(CHUNK, max(1, _WIDENED // widest))
        for begin in range(0, len(x), chunk):
            end = min(begin + chunk, len(x))
            self._add(layer, x[begin:end], y[begin:end], (begin, end))

    def _add(self, layer: _Layer, x: Tensor, y: Tensor, span: tuple[int, int]) -> None:
        _, bases, m, k_in = layer.V.shape
        k_out, copy = layer.U[0].shape[1], self._copy[span[0] : span[1]]
        where = self._base[span[0] : span[1]] - span[0] * bases
        t = (x @ layer.V.flatten(1)).view(len(x) * bases, m, k_in).index_select(0, where)
        cores = self._copies[:, layer.offset : layer.offset + m * k_in * k_out].index_select(0, copy)
        many = len(x) * m
        s = torch.bmm(t.view(many, 1, k_in), cores.view(many, k_in, k_out)).view(len(x), m * k_out)
        if layer.own is not None:
            s = s + _add_own(layer, layer.own, (x, t, y), copy)
        spread = s.new_zeros(len(x) * bases, m * k_out).index_copy_(0, where, s).view(len(x), bases, m, k_out)
        for part, (at, U) in enumerate(zip(layer.at, layer.U, strict=True)):
            mine = spread[:, :, part].reshape(len(x), bases * k_out)
            y[:, at : at + U.shape[2]].addmm_(mine, U.flatten(0, 1))

    def _fill(self, resident: Resident, row: Row, copy: int) -> None:
        if row.core is None:
            self._copies[copy] = 0
        else:
            self._copies[copy] = row.core
        for linear, layer in zip(self.linears, self._layers, strict=True):
            if layer.own is not None:
                layer.own.clear(copy)
                spans = resident.bases[linear.name][0].spans[:, 2].tolist()
                for number, module in enumerate(spans if len(row.record.data) else []):
                    part = records.unpack(row.record, 0, module) if module >= 0 else None
                    if part is not None:
                        layer.own.fill(copy, number, part)


def _add_own(layer: _Layer, own: _Own, tensors: tuple[Tensor, Tensor, Tensor], copy: Tensor) -> Tensor:
    """Add p q^T x to `y`, and give back what s gets, (T, m k_out). `tensors` are x, t and y."""
    x, t, y = tensors
    (_, m, k_in), c = t.shape, layer.components
    q = own.q.index_select(0, copy).to(x.dtype)
    weight = torch.bmm(q, x.unsqueeze(2)).squeeze(2).float() * own.right.index_select(0, copy)
    b = own.b.index_select(0, copy).view(len(x) * m, c, k_in)
    weight = weight + torch.bmm(b, t.reshape(len(x) * m, k_in, 1)).view(len(x), m * c)
    scaled = (weight * own.left.index_select(0, copy)).to(x.dtype).view(len(x), m, 1, c)
    for part, (at, p) in enumerate(zip(layer.at, own.p, strict=True)):
        y[:, at : at + p.shape[2]] += torch.bmm(scaled[:, part], p.index_select(0, copy).to(x.dtype)).squeeze(
            1
        )
    a = own.a.index_select(0, copy).view(len(x) * m, c, own.a.shape[2])
    return torch.bmm(weight.to(x.dtype).view(len(x) * m, 1, c), a).view(len(x), m * own.a.shape[2])


def _layer(linear: Linear, residents: Sequence[Resident], limits: Limits) -> _Layer:
    basis, m = residents[0].bases[linear.name][0], len(linear.parts)
    k_out, k_in = basis.k
    return _Layer(
        V=basis.V.new_zeros(linear.size, limits.bases, m, k_in),
        U=tuple(basis.U.new_zeros(limits.bases, k_out, part.size) for part in linear.parts),
        at=tuple(part.at for part in linear.parts),
        offset=basis.offset,
        own=_own(linear, residents, limits.requests + 1),
    )


def _own(linear: Linear, residents: Sequence[Resident], copies: int) -> _Own | None:
    c = _room(max(_components(linear, resident) for resident in residents))
    if not c:
        return None
    basis, m = residents[0].bases[linear.name][0], len(linear.parts)
    new = basis.V.new_zeros
    kind = basis.V.dtype if any(one.shelf.survey.floats for one in residents) else torch.int8
    return _Own(
        q=new(copies, m * c, linear.size, dtype=kind),
        p=tuple(new(copies, c, part.size, dtype=kind) for part in linear.parts),
        right=new(copies, m * c, dtype=torch.float32),
        left=new(copies, m * c, dtype=torch.float32),
        b=new(copies, m * c, basis.k[1]),
        a=new(copies, m * c, basis.k[0]),
    )


def _components(linear: Linear, resident: Resident) -> int:
    """The most that anybody has at one module of the layer, adapters loaded at run time among them."""
    modules = [module for module in resident.bases[linear.name][0].spans[:, 2].tolist() if module >= 0]
    if not modules:
        return 0
    added = [row.record.components()[:, modules].max(initial=0) for row in resident.added.values()]
    return int(max(resident.shelf.survey.most[modules].max(initial=0), *added, 0))


def _room(components: int) -> int:
    """The next of a few sizes."""
    last = _COUNTS[-1]
    return next((c for c in _COUNTS if c >= components), -(-components // last) * last)


def _check_room(linear: Linear, layer: _Layer, resident: Resident) -> None:
    needed, floats = _components(linear, resident), resident.shelf.survey.floats
    if needed > layer.components:
        what = f"{needed} components with own numbers, this server was started with {layer.components}"
    elif needed and floats and layer.own is not None and layer.own.q.dtype == torch.int8:
        what = "own numbers that are floats, this server was started with integers"
    else:
        return
    raise BundleError(f"{linear.name}: {what}; restart it with SOPPU_BUNDLE naming this bundle")
