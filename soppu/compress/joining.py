"""A user who was trained inside a bundle's bases: the basis as a value, and the core as a row of the bundle.

Nothing is fitted and nobody else's numbers are touched; a core is kept as it is, in floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from soppu.compress import edit
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.codec import page
from soppu.compress.cored import batch
from soppu.compress.cored.batch import CodedBatch
from soppu.compress.cored.groups import Cores
from soppu.compress.cored.kept import KeptBasis
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.errors import relative_errors
from soppu.compress.numbers.quantise import FLOATS
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
    return CoreBasis(sides, bundle.base_model, bundle.base_hash, bundle.fan_in_fan_out, common=bundle.common)


def bases_of(bundle: Bundle) -> list[CoreBasis]:
    """The bases of every cluster, as `basis_of` gives one. Raises as that."""
    return [basis_of(bundle, cluster) for cluster in range(len(next(iter(bundle.bases.values()))))]


def join(
    bundle: Bundle, user: str, placed: CoreInBasis, *, cluster: int = 0, bits: int = 32, adapter_id: str = ""
) -> Joined:
    """Add a user by their core. O(k^2 + own (o + i)) numbers a module are stored.

    Args:
        bits: of every number, a key of `FLOATS`; 32 keeps the core as it is.
        adapter_id: what the bundle records; by default the core's id.

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
    newcomer = edit.newcomer_of(bundle, user, placed.to_lora(), adapter_id or placed.core.id)
    newcomer = replace(newcomer, parameters=placed.core.parameters())
    coded = _coded(bundle, placed, cluster=cluster, bits=bits)
    squared = dict(zip(placed.basis.sides, coded.squared, strict=True))
    inside = dict(zip(placed.basis.sides, coded.parts, strict=True))
    stacked = torch.stack([squared.get(name, torch.zeros(1, dtype=torch.float64)) for name in bundle.shapes])
    parts = [inside.get(name) or _nothing(bundle, name) for name in bundle.shapes]
    error = float(relative_errors(stacked.sum(0), coded.norm)[0])
    data = page.encode(parts, users=1)
    one = edit.Coded(parts, stacked, error, cluster, coded.relative_to)
    return Joined(edit.extended(bundle, newcomer, one, data), error, len(data))


def put(bundle: Bundle, user: str, placed: CoreInBasis, *, cluster: int = 0) -> Joined:
    """As `join`; a row that the user has is taken out before, as `edit.forget` does it. Raises as both."""
    rest = edit.forget(bundle, user) if user in bundle.users else bundle
    return join(rest, user, placed, cluster=cluster)


def _coded(bundle: Bundle, placed: CoreInBasis, *, cluster: int, bits: int) -> CodedBatch:
    """The user alone, at the modules of the basis."""
    sides = placed.basis.sides
    kept = KeptBasis({name: bundle.bases[name][cluster] for name in sides}, sides)
    alone = Cores(torch.zeros(1, dtype=torch.int64), kept, [placed.core], kept.seen_from(placed.basis))
    return batch.code([alone], kept, users=1, bits=bits)


def _nothing(bundle: Bundle, name: str) -> Components:
    (o, i), (out, inn) = bundle.shapes[name], bundle.bases[name][0]
    none = torch.zeros(0, dtype=torch.uint8)
    sides = (Side.of_coordinates(torch.zeros(0, b.k), none, features=f) for b, f in ((out, o), (inn, i)))
    return Components(torch.zeros(0, dtype=torch.int64), torch.zeros(0), *sides)
