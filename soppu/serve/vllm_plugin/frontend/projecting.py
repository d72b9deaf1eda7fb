"""A LoRA adapter as cores on a bundle's bases, and the error of that. The bases are not fitted again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, check_shapes, validate
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.numbers.coders import least_squares
from soppu.compress.numbers.errors import squared_norms
from soppu.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Projected:
    """Cores (k_out, k_in) float32 by module, whose bases they refer to, and the relative error."""

    cores: Mapping[str, Tensor]
    cluster: int
    error: float


def project(adapter: LoraAdapter, bundle: Bundle, *, who: str, max_error: float) -> Projected:
    """The adapter on the bases of the cluster where its error is smallest.

    The core is the least-squares solution, U^+ B A (V^+)^T; the bases need not be orthonormal.
    O((o + i) (k + r)^2) a module and cluster.

    Raises:
        AdapterError: a module the bundle has no basis for, or an error above
            `max_error`; the message names the adapter, its error and what is allowed.
    """
    validate(adapter, who=who)
    if missing := sorted(adapter.pairs.keys() - bundle.shapes.keys()):
        raise AdapterError(
            f"{who}: changes {missing[0]}, which the bundle has no basis for;"
            f" it has {len(bundle.shapes)} modules"
        )
    check_shapes(adapter, bundle.shapes, who=who)
    clusters = range(int(bundle.cluster.max()) + 1)
    best = min((_on(adapter, bundle, cluster) for cluster in clusters), key=lambda projected: projected.error)
    if best.error > max_error:
        raise AdapterError(
            f"adapter {who!r}: relative error {best.error:.4f} on the resident basis, at most"
            f" {max_error:.4f} is allowed (SOPPU_MAX_ERROR; by default the error of the bundle's worst user);"
            " compress it together with the others"
        )
    return best


def _on(adapter: LoraAdapter, bundle: Bundle, cluster: int) -> Projected:
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
