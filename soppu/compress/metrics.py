"""How good a compression is: errors measured on the factors, and the report that travels in the bundle.

An error is always that of one adapter against its own core, as stored. Nothing here forms an o x i matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from soppu.compress.joint import pad
from soppu.compress.shared import SharedModule

_CHUNK_NUMBERS = 1 << 23  # dense cores compared at a time: 64 MiB


@dataclass(frozen=True)
class Certificate:
    """How far a fit is from the best that any basis of its rank could do.

    All but `total` are squared errors of unit-norm adapters, summed. They are those of the fit itself, before
    its tensors are rounded for storage; `lower_bound` holds after rounding too.

    Attributes:
        lower_bound: no shared basis of this rank, whatever the method, has a smaller error.
        achieved: the error of the fit.
        upper_bound: the guarantee of the closed-form start.
        total: the energy there was to capture, one for every adapter that is not zero.
    """

    lower_bound: float
    achieved: float
    upper_bound: float
    total: float

    @property
    def relative_lower_bound(self) -> float:
        """Least root-mean-square relative error that a basis of this rank can have, 0 to 1."""
        return math.sqrt(self.lower_bound / self.total) if self.total else 0.0

    @property
    def relative_achieved(self) -> float:
        """Root-mean-square relative error of the fit, 0 to 1."""
        return math.sqrt(self.achieved / self.total) if self.total else 0.0


@dataclass(frozen=True)
class CompressionReport:
    """What was asked, what came out, and at which error.

    Attributes:
        method: name of the method.
        k: shared rank asked for.
        k_used: module -> shared rank used; below k where i, o or the sum of the ranks is smaller.
        seed: the seed asked for.
        seconds: wall time of the fit; 0 in a report read from a file, whose bytes must not depend on a clock.
        device: "cpu" or "cuda".
        dtype: storage type of bases and cores.
        steps: module -> alternations made.
        relative_error: user -> relative error over all modules, as stored.
        module_error: module -> user -> relative error, as stored; users without the module are left out.
        certificates: module -> Certificate.
        parameters_before: numbers in the adapters.
        parameters_after: numbers in the bundle: bases, cores and norms.
    """

    method: str
    k: int
    k_used: Mapping[str, int]
    seed: int
    seconds: float
    device: str
    dtype: str
    steps: Mapping[str, int]
    relative_error: Mapping[str, float]
    module_error: Mapping[str, Mapping[str, float]]
    certificates: Mapping[str, Certificate]
    parameters_before: int
    parameters_after: int

    @property
    def relative_error_mean(self) -> float:
        """Mean over the users."""
        return sum(self.relative_error.values()) / len(self.relative_error)

    @property
    def relative_error_max(self) -> float:
        """The worst user's."""
        return max(self.relative_error.values())

    @property
    def overall(self) -> Certificate:
        """The certificates of all modules added up."""
        parts = [asdict(part) for part in self.certificates.values()]
        return Certificate(**{key: math.fsum(part[key] for part in parts) for key in parts[0]})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values. Mean, max and the overall certificate are for readers; not read back."""
        overall = self.overall
        return asdict(self) | {
            "relative_error_mean": self.relative_error_mean,
            "relative_error_max": self.relative_error_max,
            "overall": asdict(overall)
            | {
                "relative_lower_bound": overall.relative_lower_bound,
                "relative_achieved": overall.relative_achieved,
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CompressionReport:
        """The inverse of `to_dict`; a missing `seconds` is 0. Raises KeyError, TypeError or ValueError."""
        return cls(
            method=str(value["method"]),
            k=int(value["k"]),
            k_used={name: int(k) for name, k in value["k_used"].items()},
            seed=int(value["seed"]),
            seconds=float(value.get("seconds", 0.0)),
            device=str(value["device"]),
            dtype=str(value["dtype"]),
            steps={name: int(steps) for name, steps in value["steps"].items()},
            relative_error=_floats(value["relative_error"]),
            module_error={name: _floats(errors) for name, errors in value["module_error"].items()},
            certificates={name: _certificate(part) for name, part in value["certificates"].items()},
            parameters_before=int(value["parameters_before"]),
            parameters_after=int(value["parameters_after"]),
        )


def _certificate(part: Mapping[str, Any]) -> Certificate:
    return Certificate(**{item.name: float(part[item.name]) for item in fields(Certificate)})


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def squared_errors(outs: Sequence[Tensor], ins: Sequence[Tensor], module: SharedModule) -> Tensor:
    """|| D_n - D^_n ||_F^2 of every adapter against its own core, (n,) float64. O(n (o + i) k r + n k^2 r).

    With U = Q_u R_u and V = Q_v R_v, D - D^ splits into three orthogonal parts: what lies inside both bases,
    where the core stands against it; what U misses; and what U has but V misses. No part is the difference of
    two large numbers, so an exact reconstruction gives the square of round-off and not round-off itself.

    Args:
        outs: n tensors (o, r_n), the LoRA scale in them; r_n = 0 for a user without the module.
        ins: n tensors (r_n, i).
        module: the stored module, its users in the same order.
    """
    b, at = pad(outs), pad([a.mT for a in ins])
    q_u, r_u = torch.linalg.qr(module.U.to(b))
    q_v, r_v = torch.linalg.qr(module.V.to(b))
    b_in, a_in = q_u.mT @ b, q_v.mT @ at
    missed = _product_square(b - q_u @ b_in, at) + _product_square(b_in, at - q_v @ a_in)
    inside = []
    step = max(1, _CHUNK_NUMBERS // module.k**2)
    for users in (slice(first, first + step) for first in range(0, len(b), step)):
        left = r_u @ module.P[users].to(b) * module.norm[users].to(b)[:, None, None]
        right = r_v.mT if module.Q is None else module.Q[users].to(b) @ r_v.mT
        inside.append((b_in[users] @ a_in[users].mT - left @ right).square().sum((-2, -1)))
    return torch.cat(inside) + missed


def relative_errors(squared: Tensor, norm: Tensor) -> Tensor:
    """Relative errors from squared errors and norms of the deltas, (n,); 0 where the delta is zero."""
    return torch.where(norm > 0, squared.sqrt() / torch.where(norm > 0, norm, 1.0), 0.0)


def _product_square(x: Tensor, y: Tensor) -> Tensor:
    """|| x_n y_n^T ||_F^2 from x (n, d, r), y (n, e, r), by their Gram matrices."""
    return ((x.mT @ x) * (y.mT @ y)).sum((-2, -1)).clamp(min=0)
