"""A basis on the wire: U and V of a module as a LoRA's B and A, whose product nobody forms.

So a round in which a basis is learnt is checked, clipped, noised and averaged as any shared round is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.basis import CoreBasis
from soppu.federation import wire


def to_state(basis: CoreBasis) -> dict[str, Tensor]:
    """Basis -> {module.lora_A.weight: V^T (k, i), module.lora_B.weight: U (o, k)}, float32."""
    return wire.to_state(LoraAdapter({name: LoraPair(v.mT, u) for name, (u, v) in basis.sides.items()}))


def from_state(state: Mapping[str, Tensor], like: CoreBasis) -> CoreBasis:
    """Tensors that were checked -> the basis of these directions, of the model that `like` is for."""
    pairs = wire.loose_from_state(state).pairs
    return replace(like, sides={name: (pair.B, pair.A.mT.contiguous()) for name, pair in pairs.items()})
