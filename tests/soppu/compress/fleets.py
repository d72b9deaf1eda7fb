"""Made-up fleets of low-rank deltas in memory, what is true of them, and how they are cut into batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.sketch import RangePass, Ranges


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fleet(
    n: int, o: int, i: int, r: int, *, own: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A share `own` of the users has an A of its own, the rest began with one; outputs share directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = normal(r, i) / math.sqrt(i)
    mine = (torch.rand(n, generator=generator) < own)[:, None, None]
    ins = torch.where(mine, normal(n, r, i) / math.sqrt(i), first) + 0.25 * normal(n, r, i) / math.sqrt(i)
    shared = torch.linalg.qr(normal(o, min(o, 40)))[0] * torch.arange(1, min(o, 40) + 1) ** -0.6
    outs = shared @ normal(n, shared.shape[1], r) + 0.02 * normal(n, o, r)
    outs = outs * torch.arange(1, r + 1) ** -0.75 * normal(n, 1, 1).exp()
    return outs.to(dtype), ins.to(dtype)


def flat(n: int, o: int, i: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(n, o, r, seed=seed), draw(n, r, i, seed=seed + 1)


def dense(outs: Tensor, ins: Tensor) -> Tensor:
    return outs.double() @ ins.double()


def units(outs: Tensor, ins: Tensor) -> Tensor:
    deltas = dense(outs, ins)
    norm = torch.linalg.matrix_norm(deltas)
    return torch.where(norm[:, None, None] > 0, deltas / norm.clamp(min=1e-300)[:, None, None], 0.0)


def covariances(outs: Tensor, ins: Tensor) -> tuple[Tensor, Tensor]:
    made = units(outs, ins)
    return (made @ made.mT).sum(0), (made.mT @ made).sum(0)


def sketched(batches: list[Canonical], width: int, *, users: list[list[int]] | None = None) -> Ranges:
    made = RangePass(batches[0].X.shape[1], batches[0].Y.shape[1], width=width, seed=3)
    for index, batch in enumerate(batches):
        made.add(batch, None if users is None else users[index])
    return made.finish()


def cut(outs: Tensor, ins: Tensor, size: int) -> list[Canonical]:
    return [canonical(b, a) for b, a in zip(outs.split(size), ins.split(size), strict=True)]
