"""A basis on the wire, or a gradient of one: what is U's as a LoRA's B, what is V's as its A, transposed.

So a round in which a basis is learnt is checked, clipped, noised and averaged as any shared round is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.federation import wire
from soppu.federation.trained import Sides


def to_state(sides: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Sides -> {module.lora_A.weight: V^T (k, i), module.lora_B.weight: U (o, k)}, float32."""
    return wire.to_state(LoraAdapter({name: LoraPair(v.mT, u) for name, (u, v) in sides.items()}))


def from_state(state: Mapping[str, Tensor]) -> Sides:
    """Tensors that were checked, or that this process itself wrote -> sides."""
    pairs = wire.loose_from_state(state).pairs
    return {name: (pair.B, pair.A.mT.contiguous()) for name, pair in pairs.items()}
