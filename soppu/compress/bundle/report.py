"""CompressionReport: what was asked, what came out, and at which error. It travels in the bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.errors import LOST


@dataclass(frozen=True)
class CompressionReport:
    """What was asked, what came out, and at which error: modules and users by name, errors as stored."""

    method: str
    rank: int  # largest shared rank asked for
    clusters: int  # bases a module has
    target: str  # what the bundle had to reach, in words; "" where the method's own settings decided
    whitened: bool  # whether errors on the inputs were weighed by calibration
    seed: int  # the seed asked for
    device: str  # "cpu" or "cuda"
    storage: str  # how numbers are kept, in words
    parameters_before: int  # numbers in the adapters
    parameters_after: int  # numbers in the bundle: bases, coordinates, own numbers, gains
    seconds: float  # wall time of the fit; 0 if read from a file, whose bytes must not depend on a clock
    k_used: Mapping[str, int]  # module -> shared rank used, the larger of its two sides; 0 = no basis
    steps: Mapping[str, int]  # module -> alternations made
    relative_error: Mapping[str, float]  # user -> relative error over all modules
    module_error: Mapping[str, Mapping[str, float]]  # module -> user -> relative error, of users who have it
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
        """The inverse of `to_dict`; a missing `seconds` is 0. Raises ValueError naming every fault."""
        return TypeAdapter(cls).validate_python({"seconds": 0.0, **value})


# What a report says of the bundle as a whole, and as what; the rest is per user or per module.
SETTINGS = {
    name: kind for name, kind in get_type_hints(CompressionReport).items() if kind in (str, int, bool)
}
