from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair

Factors = tuple[list[Tensor], list[Tensor]]


@pytest.fixture(scope="session")
def factors() -> Callable[..., Factors]:
    """factors(ranks, o, i, shared=..., seed=...) -> related adapters of one module: lists of B and A."""

    def make(
        ranks: Sequence[int],
        o: int,
        i: int,
        *,
        shared: int = 6,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Factors:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        left, right = draw(o, shared), draw(shared, i)
        outs = [(left @ draw(shared, r) + 0.3 * draw(o, r)).to(dtype) for r in ranks]
        ins = [(draw(r, shared) @ right + 0.3 * draw(r, i)).to(dtype) for r in ranks]
        return outs, ins

    return make


@pytest.fixture(scope="session")
def fleet(factors: Callable[..., Factors]) -> Callable[..., dict[str, LoraAdapter]]:
    """fleet(ranks, shapes={module: (o, i)}, ...) -> user -> adapter; users are called user0, user1, ..."""

    def make(
        ranks: Sequence[int] = (3, 3, 3, 3),
        *,
        shapes: dict[str, tuple[int, int]] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, LoraAdapter]:
        shapes = shapes or {"model.layers.0.q": (20, 16), "model.layers.1.down": (12, 30)}
        made = {
            name: factors(ranks, *shape, seed=seed + index, dtype=dtype)
            for index, (name, shape) in enumerate(shapes.items())
        }
        return {
            f"user{user}": LoraAdapter(
                {name: LoraPair(A=ins[user], B=outs[user]) for name, (outs, ins) in made.items()},
                base_model="tiny",
                base_hash="b" * 64,
            )
            for user in range(len(ranks))
        }

    return make
