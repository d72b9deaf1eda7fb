"""Held-out loss of one user with the base model, the personal adapter and the compressed one.

Only the adapter layers differ between the three, so the layers below run once per example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from soppu.adapter import LoraAdapter
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import CachedBlock, batch_loss


@dataclass(frozen=True)
class UserLosses:
    """Mean held-out loss (nats a token) of one user, three ways."""

    user: str
    examples: int
    base: float
    personal: float
    compressed: float

    @property
    def gain(self) -> float:
        """What the personal adapter won over the base model, in nats a token."""
        return self.base - self.personal

    @property
    def gain_kept(self) -> float:
        """(base - compressed) / (base - personal): 1 is lossless; 0 where there was nothing to keep."""
        return (self.base - self.compressed) / self.gain if self.gain > 0 else 0.0


@torch.no_grad()
def mean_loss(
    top: TopModel,
    plan: LayerPlan,
    blocks: Sequence[CachedBlock],
    *,
    adapter: LoraAdapter | None,
    batch_size: int = 8,
) -> float:
    """Mean cross-entropy over all unmasked labels of the blocks, nats a token.

    Args:
        blocks: behind whichever bottom is to be measured, emulator or full.
        adapter: full-model names; None measures the base model.
    """
    own = emulator.to_own(adapter, plan, plan.adapter) if adapter else None
    summed, counted = 0.0, 0
    with attached(top.model, own):
        for start in range(0, len(blocks), batch_size):
            loss, count = batch_loss(top, blocks[start : start + batch_size])
            summed, counted = summed + float(loss), counted + count
    return summed / max(counted, 1)
