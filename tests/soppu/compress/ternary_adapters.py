"""Adapters of normal numbers, and the dense changes and the signs of their ternary forms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.numbers.ternary import Ternary

SHAPES = {"model.layers.0.q": (20, 16), "model.layers.1.down": (12, 30), "model.layers.0.q2": (9, 11)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(rank: int = 3, *, b: float = 1.0, seed: int = 0) -> LoraAdapter:
    """An adapter of normal numbers, those of B times `b`."""
    pairs = {}
    for index, (name, (o, i)) in enumerate(SHAPES.items()):
        pairs[name] = LoraPair(
            A=draw(rank, i, seed=seed + 2 * index), B=b * draw(o, rank, seed=seed + 2 * index + 1)
        )
    return LoraAdapter(pairs, base_model="tiny", base_hash="b" * 64)


def dense(made: dict[str, Ternary]) -> dict[str, Tensor]:
    return {n: part.B.double() * part.gain.double() @ part.A.double() for n, part in made.items()}


def flat(made: dict[str, Ternary]) -> np.ndarray:
    return np.concatenate([side.numpy().reshape(-1) for part in made.values() for side in (part.A, part.B)])
