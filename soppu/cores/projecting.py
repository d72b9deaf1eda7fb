"""From an adapter to a core: the nearest one inside a basis, and what is left outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.basis import CoreBasis
from soppu.cores.core import MOST_OWN, CoreAdapter, CoreInBasis
from soppu.errors import AdapterError

_NOTHING = 1e-6  # of the adapter: what is left of it is round-off, and no direction of its own


@dataclass(frozen=True, eq=False)
class Projected:
    """The nearest core, and the relative Frobenius error that stays, over all modules."""

    core: CoreAdapter
    error: float


def from_lora(
    adapter: LoraAdapter, basis: CoreBasis, *, own_rank: int = 0, who: str = "adapter"
) -> Projected:
    """Project an adapter onto a basis: exact where the basis spans it. O((o + i)(k + r)^2) a module.

    Modules that the basis lacks are left out, and count in the error.

    Args:
        own_rank: of what the core keeps of its own in every module: the nearest to what is left.

    Raises:
        AdapterError: another base model or layout, other shapes, or `own_rank` out of its range.
    """
    if not 0 <= own_rank <= MOST_OWN:
        raise AdapterError(f"{who}: own_rank = {own_rank}, allowed: 0 to {MOST_OWN}")
    check_fits(adapter, basis, who=who)
    shapes = basis.module_shapes()
    cores, own, left = {}, {}, 0.0
    whole = sum(_square(*_factors(pair)) for pair in adapter.pairs.values())
    for name, (k_out, k_in) in basis.core_shapes().items():
        if name not in adapter.pairs:
            cores[name] = torch.zeros(k_out, k_in)
            continue
        B, A = _factors(adapter.pairs[name])
        u, v = (side.double() for side in basis.sides[name])
        core = (torch.linalg.pinv(u) @ B) @ (A @ torch.linalg.pinv(v).mT)
        cores[name] = core.float()
        rest = torch.cat([B, -(u @ cores[name].double())], 1), torch.cat([A, v.mT])
        if own_rank and _square(*rest) > _NOTHING**2 * whole:
            own[name] = _leading(*rest, rank=own_rank)
            rest = torch.cat([rest[0], -own[name].B.double()], 1), torch.cat([rest[1], own[name].A.double()])
        left += _square(*rest)
    left += sum(_square(*_factors(pair)) for name, pair in adapter.pairs.items() if name not in shapes)
    core_ = CoreAdapter(basis.id, cores, own, basis.base_model, basis.base_hash, basis.fan_in_fan_out)
    return Projected(core_, (left / whole) ** 0.5 if whole else 0.0)


def check_fits(adapter: LoraAdapter, basis: CoreBasis, *, who: str) -> None:
    """AdapterError: an adapter of another base model or layout than a basis is for, or of other shapes."""
    base_identity.check(adapter.base, basis.base, who=who, whose="the basis is for")
    shapes = basis.module_shapes()
    for name, (o, _, i) in adapter.shapes().items():
        if name in shapes and shapes[name] != (o, i):
            raise AdapterError(f"{who}: {name}: shape {(o, i)}, the basis has {shapes[name]}")


def carry(core: CoreInBasis, basis: CoreBasis) -> CoreAdapter:
    """The core told in another basis: the same change, where that spans it; what is the user's own stays.

    S' = U'^+ U S V^T V'^+T. O((o + i) k^2) a module. Raises AdapterError: the bases have other modules.
    """
    return Carrier(core.basis, basis).carry(core).core


class Carrier:
    """Carries the cores of one basis over to another; what the two have in common is found once.

    O((o + i) k^2) a module, and O(k^3) a core and module from then on.
    """

    def __init__(self, old: CoreBasis, new: CoreBasis) -> None:
        """Raises AdapterError: the bases have other modules."""
        if old.module_shapes() != new.module_shapes():
            raise AdapterError(f"basis {new.id} is of other modules than {old.id}")
        self.new = new
        self._turns = {}
        for name, (u, v) in old.sides.items():
            new_u, new_v = new.sides[name]
            self._turns[name] = _turn(new_u, u), _turn(new_v, v)

    def carry(self, core: CoreInBasis) -> Projected:
        """The core in the new basis, and the relative error of the whole change that stays."""
        cores, left, whole = {}, 0.0, 0.0
        for name, ((out, out_roots), (inn, inn_roots)) in self._turns.items():
            s, k_out, k_in = core.core.cores[name].double(), out.shape[1], inn.shape[1]
            cores[name] = (out @ s @ inn.mT).float()
            there = out_roots[:, :k_out] @ s @ inn_roots[:, :k_in].mT
            here = out_roots[:, k_out:] @ cores[name].double() @ inn_roots[:, k_in:].mT
            left += float((there - here).square().sum())
            own = core.core.own.get(name)
            whole += float(there.square().sum()) if own is None else _whole(core, name)
        new = self.new
        told = CoreAdapter(new.id, cores, core.core.own, new.base_model, new.base_hash, new.fan_in_fan_out)
        return Projected(told, (left / whole) ** 0.5 if whole else 0.0)


def _turn(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """What takes coordinates in the old columns to the new ones, and both sides in one triangular frame."""
    both = torch.cat([old, new], 1).double()
    return torch.linalg.pinv(new.double()) @ old.double(), torch.linalg.qr(both, mode="r").R


def _whole(core: CoreInBasis, name: str) -> float:
    """Squared norm of all that a core and its own rank change at a module."""
    (u, v), own = core.basis.sides[name], core.core.own[name]
    left = torch.cat([u.double() @ core.core.cores[name].double(), own.B.double()], 1)
    return _square(left, torch.cat([v.double().mT, own.A.double()]))


def _factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    return pair.B.detach().cpu().double(), pair.A.detach().cpu().double()


def _triangles(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """Q and R of both factors of left @ right."""
    return (*torch.linalg.qr(left), *torch.linalg.qr(right.mT))


def _square(left: Tensor, right: Tensor) -> float:
    """|| left @ right ||_F^2 by triangular factors: what cancels leaves the square of round-off."""
    _, out, _, inn = _triangles(left, right)
    return float((out @ inn.mT).square().sum())


def _leading(left: Tensor, right: Tensor, *, rank: int) -> LoraPair:
    """The nearest product of a rank, the singular values shared evenly."""
    q_out, out, q_in, inn = _triangles(left, right)
    u, s, vt = torch.linalg.svd(out @ inn.mT)
    root = s[:rank].sqrt()
    return LoraPair(
        A=(root[:, None] * (vt[:rank] @ q_in.mT)).float(), B=((q_out @ u[:, :rank]) * root).float()
    )
