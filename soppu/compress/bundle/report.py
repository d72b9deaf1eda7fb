"""CompressionReport: what was asked, what came out, and at which error. It travels in the bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.errors import LOST

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
    def lost_users(self) -> tuple[str, ...]:
        """Users of whose change nothing is in the bundle: they are served the base model."""
        return tuple(user for user, error in self.relative_error.items() if error >= LOST)

    @property
    def lost_modules(self) -> tuple[str, ...]:
        """Modules at which nothing is left of anybody's change."""
        changed = {name: [e for e in errors.values() if e] for name, errors in self.module_error.items()}
        return tuple(name for name, errors in changed.items() if errors and min(errors) >= LOST)

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
            "lost_users": list(self.lost_users),
            "lost_modules": list(self.lost_modules),
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
