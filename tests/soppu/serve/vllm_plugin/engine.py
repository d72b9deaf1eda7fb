"""A made-up engine: one attention block, packed as vLLM packs it, whole or as one of several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.serve.vllm_plugin.worker.resident import Linear, Part
from tests.soppu.serve import handmade

SHAPES: Mapping[str, tuple[int, int]] = {
    "block.q_proj": (24, 20),
    "block.k_proj": (8, 20),
    "block.v_proj": (8, 20),
    "block.o_proj": (20, 24),
}
INPUTS = {"block.qkv_proj": 20, "block.o_proj": 24}
PACKED = {
    "block.qkv_proj": ("block.q_proj", "block.k_proj", "block.v_proj"),
    "block.o_proj": ("block.o_proj",),
}


def linears(*, rank: int = 0, size: int = 1) -> list[Linear]:
    """Column-parallel q, k and v, row-parallel o: as rank `rank` of `size` holds them."""
    parts, at = [], 0
    for name in PACKED["block.qkv_proj"]:
        local = SHAPES[name][0] // size
        parts.append(Part(name, SHAPES[name], first=rank * local, size=local, at=at))
        at += local
    o, i = SHAPES["block.o_proj"]
    return [
        Linear("block.qkv_proj", first=0, size=20, out=at, parts=tuple(parts)),
        Linear(
            "block.o_proj",
            first=rank * i // size,
            size=i // size,
            out=o,
            parts=(Part("block.o_proj", SHAPES["block.o_proj"], first=0, size=o, at=0),),
        ),
    ]


def change(bundle: Bundle, user: str | None, layer: str) -> Tensor:
    """What one user adds to a whole layer's weight (o, i), component by component; None is the base model."""
    blocks = []
    for name in PACKED[layer]:
        known = user is not None and name in bundle.shapes
        blocks.append(
            handmade.meaning(bundle, user, name) if known and user else torch.zeros(SHAPES[name]).double()
        )
    return torch.cat(blocks)


def expected(bundle: Bundle, users: Sequence[str | None], layer: str, x: Tensor) -> Tensor:
    """The sum that the tokens' users add to the output: `x` (T, i), one user a token, (T, o) float64."""
    changes = {user: change(bundle, user, layer) for user in set(users)}
    return torch.stack([changes[user] @ row for user, row in zip(users, x.double(), strict=True)])
