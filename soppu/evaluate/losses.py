"""Held-out loss of one user: with the base model, the shared adapter, their own, and the compressed one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from soppu.adapter import LoraAdapter
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.personalise import BASE, PERSONAL, SHARED
from soppu.federation.train import CachedBlock, before_head

CURRENT = "current"  # what the registry holds for a user: no federation of this run has chosen it
_ROWS = 1024  # labels whose logits are held at a time
COLUMNS = ("base", "shared", "personal", "compressed")
FULL_MODEL, EMULATOR = "full model", "emulator at the client"
TOLERANCE = 0.01
"""Nats a token. A difference up to this is not told from noise, and is no ratio's denominator."""


@dataclass(frozen=True)
class ExampleLosses:
    """What one user's held-out examples have by themselves, in the same order in every column.

    Attributes:
        tokens: unmasked tokens of each example.
        sums: column -> summed loss (nats) of each.
    """

    tokens: tuple[int, ...]
    sums: Mapping[str, tuple[float, ...]]

    def mean(self, column: str) -> float:
        """Nats a token over all examples."""
        return math.fsum(self.sums[column]) / max(sum(self.tokens), 1)

    def to_dict(self) -> dict[str, str]:
        """As texts of numbers: a line each in a JSON file, and readable."""
        sums = {name: " ".join(f"{value:.7g}" for value in values) for name, values in self.sums.items()}
        return {"tokens": " ".join(map(str, self.tokens)), **sums}

    @classmethod
    def from_dict(cls, value: Mapping[str, str]) -> ExampleLosses:
        """The inverse of `to_dict`, to seven digits."""
        sums = {name: tuple(map(float, text.split())) for name, text in value.items() if name != "tokens"}
        return cls(tuple(map(int, value["tokens"].split())), sums)


@dataclass(frozen=True)
class UserLosses:
    """Mean held-out loss (nats a token) of one user, four ways."""

    user: str
    examples: int
    base: float
    personal: float
    compressed: float  # of what the user is served, as the bundle holds it
    shared: float | None = None  # None where nothing is shared: a recompression of adapters from anywhere
    served: str = PERSONAL  # which of the three was chosen for the user, on other text; or `CURRENT`
    measured_on: str = FULL_MODEL  # or `EMULATOR`: a model that stands for the full one
    # the same two on the text by which it was chosen; None where that is not at hand
    validation_shared: float | None = None
    validation_compressed: float | None = None
    each: ExampleLosses | None = None  # None where the examples stay with the user

    @property
    def chosen(self) -> float:
        """The loss of what was chosen, before compression; NaN for a shared adapter not measured."""
        losses = {SHARED: math.nan if self.shared is None else self.shared, BASE: self.base}
        return losses.get(self.served, self.personal)

    @property
    def gain(self) -> float:
        """What was won over the base model before compression, in nats a token."""
        return self.base - self.chosen

    @property
    def gain_kept(self) -> float:
        """(base - compressed) / (base - chosen): 1 is lossless; 0 where there was nothing to keep."""
        return (self.base - self.compressed) / self.gain if self.gain > 0 else 0.0

    @property
    def compression_lost(self) -> bool | None:
        """Whether the shared adapter would do better than what is left of the user's, on validation text.

        A user who is served the shared adapter has lost once its compressed form is more than `TOLERANCE`
        worse. None where this was not measured, or nothing of the user is compressed.
        """
        if self.validation_shared is None or self.validation_compressed is None or self.served == BASE:
            return None
        allowance = TOLERANCE if self.served == SHARED else 0.0
        return self.validation_compressed > self.validation_shared + allowance

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `each` is packed."""
        each = self.each.to_dict() if self.each else None
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"each": each}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> UserLosses:
        """The inverse of `to_dict`."""
        each = value.get("each")
        return cls(**{**value, "each": ExampleLosses.from_dict(each) if each else None})


@torch.no_grad()
def example_losses(
    top: TopModel,
    plan: LayerPlan,
    blocks: Sequence[CachedBlock],
    *,
    adapter: LoraAdapter | None,
    batch_size: int = 8,
) -> list[tuple[float, int]]:
    """Summed loss (nats) of every block and the tokens it counts; None measures the base model.

    Cost: one forward pass of the top. Raises AdapterError for an adapter of other layers.
    """
    own = emulator.to_own(adapter, plan, plan.adapter) if adapter else None
    found: list[tuple[float, int]] = []
    with attached(top.model, own):
        for start in range(0, len(blocks), batch_size):
            hidden, target, counts = before_head(top, blocks[start : start + batch_size])
            rows = zip(hidden.split(_ROWS), target.split(_ROWS), strict=True)
            losses = [cross_entropy(top.logits(h).float(), t, reduction="none") for h, t in rows]
            each = torch.cat(losses).double().split(counts)
            found += [(float(one.sum()), count) for one, count in zip(each, counts, strict=True)]
    return found
