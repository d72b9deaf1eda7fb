"""A LoRA adapter as cores on a bundle's bases, or as own numbers beside them, and the error of that.

The bases are not fitted again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, check_shapes, validate
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.numbers.coders import least_squares
from soppu.compress.numbers.components import unit
from soppu.compress.numbers.errors import squared_norms
from soppu.compress.numbers.quantise import quantise, scale_of
from soppu.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Projected:
    """Cores (k_out, k_in) float32 by module, whose bases they refer to, and the relative error."""

    cores: Mapping[str, Tensor]
    cluster: int
    error: float


def project(adapter: LoraAdapter, bundle: Shelf, *, who: str) -> Projected:
    """The adapter on the bases of the cluster where its error is smallest.

    The core is the least-squares solution, U^+ B A (V^+)^T; the bases need not be orthonormal.
    O((o + i) (k + r)^2) a module and cluster.

    Raises:
        AdapterError: a module the bundle does not know.
    """
    validate(adapter, who=who)
    if missing := sorted(adapter.pairs.keys() - bundle.shapes.keys()):
        raise AdapterError(
            f"{who}: changes {missing[0]}, which the bundle has no basis for;"
            f" it has {len(bundle.shapes)} modules"
        )
    check_shapes(adapter, bundle.shapes, who=who)
    clusters = range(bundle.clusters)
    return min((_on(adapter, bundle, cluster) for cluster in clusters), key=lambda projected: projected.error)


def refusal(who: str, error: float, max_error: float) -> AdapterError:
    """What is said of an adapter whose error is above what is allowed."""
    return AdapterError(
        f"adapter {who!r}: relative error {error:.4f} on the resident basis, at most"
        f" {max_error:.4f} is allowed (SOPPU_MAX_ERROR; by default the error of the bundle's worst user);"
        " compress it together with the others"
    )


@dataclass(frozen=True, eq=False)
class Integers:
    """Own numbers as `worker.Worker.put_own` reads them, and the relative error."""

    tensors: Mapping[str, Tensor]
    error: float


def integers(adapter: LoraAdapter) -> Integers:
    """The adapter as components of its own, integers of 8 bits on both sides. O((o + i) r^2) a module."""
    tensors, lost, whole = dict[str, Tensor](), 0.0, 0.0
    for name, pair in adapter.pairs.items():
        out, left = torch.linalg.qr(pair.B.double())
        inn, right = torch.linalg.qr(pair.A.double().mT)
        u, s, vt = torch.linalg.svd(left @ right.mT, full_matrices=False)
        sides, gain = [], s
        for rows in ((out @ u).mT, vt @ inn.mT):
            numbers = quantise(rows, 8)
            gain = gain * scale_of(rows, numbers.double()) * numbers.norm(dim=1)
            sides.append(numbers)
        p, q = (unit(numbers.double()) for numbers in sides)
        B, A = pair.B.double(), pair.A.double()
        whole += float(squared_norms(B, A))
        lost += float(squared_norms(torch.cat([B, -(p.mT * gain)], 1), torch.cat([A, q])))
        tensors[f"{name}.gain"] = gain.float()
        tensors |= {f"{name}.{side}": rows.to(torch.int8) for side, rows in zip("pq", sides, strict=True)}
    return Integers(tensors, (lost / whole) ** 0.5 if whole else 0.0)


def _on(adapter: LoraAdapter, bundle: Shelf, cluster: int) -> Projected:
    cores, lost, whole = {}, 0.0, 0.0
    for name, pair in adapter.pairs.items():
        U, V = bundle.matrices(name, cluster)
        B, A = pair.B.double(), pair.A.double()
        whole += float(squared_norms(B, A))
        if U is not None and V is not None:
            U, V = U.double(), V.double()
            core = least_squares(U) @ B @ (A @ least_squares(V).mT)
            cores[name] = core.float()
            B, A = torch.cat([B, -U @ core], 1), torch.cat([A, V.mT])
        lost += float(squared_norms(B, A))
    return Projected(cores, cluster, (lost / whole) ** 0.5 if whole else 0.0)
