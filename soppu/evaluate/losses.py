"""Held-out loss of one user: with the base model, the shared adapter, their own, and the compressed one."""

from __future__ import annotations

from dataclasses import dataclass

from soppu.federation.personalise import BASE, PERSONAL, SHARED


@dataclass(frozen=True)
class UserLosses:
    """Mean held-out loss (nats a token) of one user, four ways."""

    user: str
    examples: int
    base: float
    personal: float
    compressed: float  # of what the user is served, as the bundle holds it
    shared: float | None = None  # None where nothing is shared: a recompression of adapters from anywhere
    served: str = PERSONAL  # which of the three was chosen for the user, on other text

    @property
    def chosen(self) -> float:
        """The loss of what was chosen, before compression."""
        return {PERSONAL: self.personal, SHARED: self.shared, BASE: self.base}[self.served] or 0.0

    @property
    def gain(self) -> float:
        """What was won over the base model before compression, in nats a token."""
        return self.base - self.chosen

    @property
    def gain_kept(self) -> float:
        """(base - compressed) / (base - chosen): 1 is lossless; 0 where there was nothing to keep."""
        return (self.base - self.compressed) / self.gain if self.gain > 0 else 0.0
