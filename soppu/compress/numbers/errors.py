"""How good a compression is: errors measured on the factors, and the report that travels in the bundle.

An error is always that of one adapter against its own core, as stored. Nothing here forms an o x i matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from soppu.compress.numbers.components import Components, grids, slots


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
        confidence: probability that the lower bound holds: 1 where it follows from the numbers alone, less
        by a
            stated amount where random probes had a part in it.
    """

    lower_bound: float
    achieved: float
    upper_bound: float
    total: float
    confidence: float = 1.0

    @classmethod
    def without_basis(cls, adapters: int) -> Certificate:
        """Of a module without a shared basis: a basis of rank 0 leaves all the energy there is."""
        return cls(*[float(adapters)] * 4)

    @property
    def relative_lower_bound(self) -> float:
        """Least root-mean-square relative error that a basis of this rank can have, 0 to 1."""
        return math.sqrt(self.lower_bound / self.total) if self.total else 0.0

    @property
    def relative_achieved(self) -> float:
        """Root-mean-square relative error of the fit, 0 to 1."""
        return math.sqrt(self.achieved / self.total) if self.total else 0.0


# What a report says of the bundle as a whole, and as what; the rest is per user or per module.
SETTINGS: Mapping[str, type] = MappingProxyType(
    {
        "method": str,
        "rank": int,
        "clusters": int,
        "target": str,
        "whitened": bool,
        "seed": int,
        "device": str,
        "storage": str,
        "parameters_before": int,
        "parameters_after": int,
    }
)


@dataclass(frozen=True)
class CompressionReport:
    """What was asked, what came out, and at which error.

    Attributes:
        method: name of the method.
        rank: largest shared rank asked for.
        clusters: bases a module has.
        target: what the bundle had to reach, in words; "" where the method's own settings decided.
        whitened: whether errors on the inputs were weighed by calibration.
        seed: the seed asked for.
        device: "cpu" or "cuda".
        storage: how numbers are kept, in words.
        parameters_before: numbers in the adapters.
        parameters_after: numbers in the bundle: bases, coordinates, own numbers, gains.
        seconds: wall time of the fit; 0 in a report read from a file, whose bytes must not depend on a clock.
        k_used: module -> shared rank used, the larger of its two sides; 0 = no basis.
        steps: module -> alternations made.
        relative_error: user -> relative error over all modules, as stored.
        module_error: module -> user -> relative error, as stored; users without the module are left out.
        certificates: module -> Certificate.
    """

    method: str
    rank: int
    clusters: int
    target: str
    whitened: bool
    seed: int
    device: str
    storage: str
    parameters_before: int
    parameters_after: int
    seconds: float
    k_used: Mapping[str, int]
    steps: Mapping[str, int]
    relative_error: Mapping[str, float]
    module_error: Mapping[str, Mapping[str, float]]
    certificates: Mapping[str, Certificate]

    def settings(self) -> dict[str, Any]:
        """What is said of the bundle as a whole."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def relative_error_rms(self) -> float:
        """Root mean square over the users: what a fit minimises."""
        return math.sqrt(math.fsum(e * e for e in self.relative_error.values()) / len(self.relative_error))

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
        sums = {key: math.fsum(part[key] for part in parts) for key in parts[0]}
        unsure = math.fsum(1 - part["confidence"] for part in parts)
        return Certificate(**sums | {"confidence": max(1 - unsure, 0.0)})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values. Mean, max and the overall certificate are for readers; not read back."""
        overall = self.overall
        return asdict(self) | {
            "relative_error_rms": self.relative_error_rms,
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
            **{name: kind(value[name]) for name, kind in SETTINGS.items()},
            seconds=float(value.get("seconds", 0.0)),
            k_used={name: int(k) for name, k in value["k_used"].items()},
            steps={name: int(steps) for name, steps in value["steps"].items()},
            relative_error=_floats(value["relative_error"]),
            module_error={name: _floats(errors) for name, errors in value["module_error"].items()},
            certificates={name: _certificate(part) for name, part in value["certificates"].items()},
        )


def _certificate(part: Mapping[str, Any]) -> Certificate:
    return Certificate(**{item.name: float(part[item.name]) for item in fields(Certificate)})


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def squared_errors(
    B: Tensor, A: Tensor, parts: Components, bases: tuple[Tensor | None, Tensor | None], *, norm: Tensor
) -> Tensor:
    """|| D_n - D^_n ||_F^2 of b adapters against their own components as stored, (b,) float64.

    The difference is one low-rank product, [B, -L^T g] [A; R], and its norm that of the product of two
    triangular factors, so an exact reconstruction gives the square of round-off. O(b (o + i) (r + c)^2).

    Args:
        B: (b, o, r) with A (b, r, i) the deltas.
        parts: components of the users 0 to b - 1.
        bases: output and input basis as stored.
        norm: (b,) what gains are relative to.
    """
    left, right = grids(parts, bases, users=len(norm))
    gains = parts.gain.double() * norm.double()[parts.user]
    scaled = left.clone()
    scaled[parts.user, slots(parts.user)] *= gains[:, None]
    out = torch.cat([B.double(), -scaled.mT], 2)
    inn = torch.cat([A.double(), right], 1)
    return torch.linalg.matrix_norm(_triangle(out) @ _triangle(inn.mT).mT).square()


def _triangle(x: Tensor) -> Tensor:
    return torch.linalg.qr(x, mode="r").R


def relative_errors(squared: Tensor, norm: Tensor) -> Tensor:
    """Relative errors from squared errors and norms of the deltas, (n,); 0 where the delta is zero."""
    return torch.where(norm > 0, squared.sqrt() / torch.where(norm > 0, norm, 1.0), 0.0)
