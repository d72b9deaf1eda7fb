"""A user who was trained inside a bundle's bases: the basis as a value, and the core as a row of the bundle.

Nothing is fitted and nobody else's numbers are touched; a core is kept as it is, in floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.compress import edit
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.codec import page
from soppu.compress.numbers.components import Components, Side, concatenate, unit
from soppu.compress.numbers.errors import relative_errors, squared_errors
from soppu.compress.numbers.quantise import FLOATS, quantise_coords
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.errors import BundleError, ConfigError


@dataclass(frozen=True, eq=False)
class Joined:
    """A bundle with one user more."""

    bundle: Bundle
    error: float  # relative error of the user as stored: rounding to `bits`
    added: int  # bytes of the user's page


def basis_of(bundle: Bundle, cluster: int = 0) -> CoreBasis:
    """The bases of one cluster as users of the bundle have them, of the modules with one on both sides.

    Raises:
        BundleError: no module has: its users have numbers of their own and share nothing.
    """
    found = {name: bundle.matrices(name, cluster) for name in bundle.shapes}
    sides = {name: (u, v) for name, (u, v) in found.items() if u is not None and v is not None}
    if not sides:
        raise BundleError(
            "the bundle has no module with a basis on both sides, so nothing can be trained inside it;"
            " compress with the method joint, or residual with more users"
        )
    return CoreBasis(sides, bundle.base_model, bundle.base_hash, bundle.fan_in_fan_out)


def bases_of(bundle: Bundle) -> list[CoreBasis]:
    """The bases of every cluster, as `basis_of` gives one. Raises as that."""
    return [basis_of(bundle, cluster) for cluster in range(len(next(iter(bundle.bases.values()))))]


def join(
    bundle: Bundle, user: str, placed: CoreInBasis, *, cluster: int = 0, bits: int = 32, adapter_id: str = ""
) -> Joined:
    """Add a user by their core. O(k^2 + own (o + i)) numbers a module are stored.

    Args:
        bits: of every number, a key of `FLOATS`; 32 keeps the core as it is.
        adapter_id: what the bundle records; by default the registry's id of the core as an ordinary adapter.

    Raises:
        AdapterError: the core lies in another basis than the cluster's.
        BundleError: the user is in the bundle already.
        ConfigError: `bits` is not allowed.
    """
    if bits not in FLOATS:
        raise ConfigError(f"bits = {bits}, allowed: {', '.join(map(str, FLOATS))}")
    if user in bundle.users:
        raise BundleError(f"user {user!r} is in the bundle already; remove the user first")
    placed = CoreInBasis(placed.core, basis_of(bundle, cluster), who=user)
    newcomer = edit.newcomer_of(bundle, user, placed.to_lora(), adapter_id)
    (batch,) = newcomer.batches()
    parts, squared = [], []
    for name in bundle.shapes:
        bases = bundle.matrices(name, cluster)
        part = _module(placed, name, bases, float(newcomer.norm), bits) if name in placed.core.cores else None
        part = part or _nothing(bundle, name)
        squared.append(squared_errors(*batch.factors(name), part, bases, norm=newcomer.norm))
        parts.append(part)
    stacked = torch.stack(squared)
    error = float(relative_errors(stacked.sum(0), newcomer.norm)[0])
    data = page.encode(parts, users=1)
    coded = edit.Coded(parts, stacked, error, cluster)
    return Joined(edit.extended(bundle, newcomer, coded, data), error, len(data))


def put(bundle: Bundle, user: str, placed: CoreInBasis, *, cluster: int = 0) -> Joined:
    """As `join`; a row that the user has is taken out before, as `edit.forget` does it. Raises as both."""
    rest = edit.forget(bundle, user) if user in bundle.users else bundle
    return join(rest, user, placed, cluster=cluster)


def id_of(placed: CoreInBasis) -> str:
    """The adapter id that `join` records by default."""
    return f"a-{placed.to_lora().content_hash()[:16]}"


def _module(
    placed: CoreInBasis, name: str, bases: tuple[Tensor | None, Tensor | None], norm: float, bits: int
) -> Components:
    """Component j is basis vector j, with row j of the core as coordinates; then come the own ranks."""
    u, v = bases
    assert u is not None and v is not None
    core, own = placed.core.cores[name], placed.core.own.get(name)
    k_out, k_in = core.shape
    left = Side.of_axes(torch.arange(k_out), features=len(u), k=k_out)
    scale = core.abs().amax(1).clamp(min=torch.finfo(core.dtype).tiny)  # a 16-bit float has little range
    width = torch.full((k_out,), bits, dtype=torch.uint8)
    right = Side.of_coordinates(quantise_coords(core / scale[:, None], bits), width, features=len(v))
    inside = Components(torch.zeros(k_out, dtype=torch.int64), _relative(scale, norm), left, right)
    return concatenate([inside, _beside(own, (k_out, k_in), norm, bits)]) if own else inside


def _beside(own: LoraPair, ranks: tuple[int, int], norm: float, bits: int) -> Components:
    """The user's own ranks: sides of unit length without coordinates."""
    rows = own.B.mT.float(), own.A.float()
    left, right = (
        replace(Side.of_own(quantise_coords(unit(one), bits), bits), coords=torch.zeros(0, k))
        for one, k in zip(rows, ranks, strict=True)
    )
    gain = rows[0].norm(dim=1) * rows[1].norm(dim=1)
    return Components(torch.zeros(own.rank, dtype=torch.int64), _relative(gain, norm), left, right)


def _relative(gain: Tensor, norm: float) -> Tensor:
    """As a bundle keeps gains; of a user who changes nothing there is nothing to keep."""
    return (gain.double() / norm).float() if norm else torch.zeros(len(gain))


def _nothing(bundle: Bundle, name: str) -> Components:
    (o, i), (out, inn) = bundle.shapes[name], bundle.bases[name][0]
    none = torch.zeros(0, dtype=torch.uint8)
    sides = (Side.of_coordinates(torch.zeros(0, b.k), none, features=f) for b, f in ((out, o), (inn, i)))
    return Components(torch.zeros(0, dtype=torch.int64), torch.zeros(0), *sides)
