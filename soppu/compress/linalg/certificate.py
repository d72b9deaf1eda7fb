"""What bounds say of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Certificate:
    """How far a fit is from the best that any basis of its rank could do.

    All but `total` are squared errors of unit-norm adapters, summed. They are those of the fit itself, before
    its tensors are rounded for storage; `lower_bound` holds after rounding too.
    """

    lower_bound: float  # no shared basis of this rank, whatever the method, has a smaller error
    achieved: float  # the error of the fit
    upper_bound: float  # the guarantee of the closed-form start
    total: float  # the energy there was to capture, one for every adapter that is not zero
    # Probability that the lower bound holds: 1 where it follows from the numbers alone, less by a stated
    # amount where random probes had a part in it.
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
