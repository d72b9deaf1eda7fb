"""What ternary forms leave and what they could take: measures that tests and benchmarks share."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.numbers.ternary import Ternary, faithful, fixed
from soppu.errors import AdapterError, ConfigError

Progress = Callable[[str, int, int], None]
_MODES = ("faithful", "fixed")
_BLOCK = 1 << 20  # of the format


def entropy(density: float) -> float:
    """Least bits a value of random places and signs takes: H_b(p) + p for a share p of nonzeros.

    Raises:
        ConfigError: a density outside 0 to 1.
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"a density of {density!r}, allowed: 0 to 1")
    p = float(density)
    if p in (0.0, 1.0):
        return p
    return p - p * math.log2(p) - (1 - p) * math.log2(1 - p)


def rice(values: NDArray[np.int8]) -> bytes:
    """A ternary stream of Rice codes alone, as the published size counts it; `golomb.decode` reads it."""
    blocks = [values[start : start + _BLOCK] for start in range(0, values.size, _BLOCK)]
    return struct.pack("<Q", values.size) + b"".join(_rice_block(block) for block in blocks)


def _rice_block(block: NDArray[np.int8]) -> bytes:
    at = np.flatnonzero(block)
    if not at.size:
        return struct.pack("<BII", 0, 0, 0)
    b, p = 0, at.size / block.size
    if p < 1:
        ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-p)
        b = max(0, 1 + math.floor(math.log2(ratio)))
    gaps = np.diff(at, prepend=-1) - 1
    unary = np.zeros(int((gaps >> b).sum()) + at.size, np.bool_)
    unary[np.cumsum((gaps >> b) + 1) - 1] = True
    planes = [gaps >> bit & 1 for bit in range(b)]
    fields = [np.packbits(bits.astype(np.bool_)).tobytes() for bits in (unary, *planes, block[at] < 0)]
    return struct.pack("<BII", b, at.size, len(fields[0])) + b"".join(fields)


def scaled(parts: Mapping[str, Ternary], factor: float) -> dict[str, Ternary]:
    """Every change times a factor."""
    return {name: replace(part, gain=part.gain * factor) for name, part in parts.items()}


@dataclass(frozen=True)
class Cell:
    """One setting that a sweep tried.

    Attributes:
        density: as asked for.
        alpha: as asked for.
        kept: share of the numbers that are not 0.
        loss: held-out loss of the ternary adapter.
    """

    density: float
    alpha: float
    kept: float
    loss: float


@dataclass(frozen=True)
class SweepResult:
    """The held-out loss at every density and alpha; prints as a table, the best cell marked by a star.

    Attributes:
        mode: "faithful" or "fixed".
        cells: density by density, in the order asked for.
    """

    mode: str
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell:
        """The cell of the least finite loss; of equal ones that of the smallest density, then alpha."""
        finite = (cell for cell in self.cells if math.isfinite(cell.loss))
        return min(finite, key=lambda cell: (cell.loss, cell.density, cell.alpha))

    def as_dict(self) -> dict[str, Any]:
        """What goes into JSON; a loss that is not finite becomes None."""
        rows = [asdict(cell) for cell in self.cells]
        for row in rows:
            row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None
        return {"mode": self.mode, "cells": rows, "best": asdict(self.best)}

    def __str__(self) -> str:
        alphas = list(dict.fromkeys(cell.alpha for cell in self.cells))
        lines = [f"{self.mode:>9}" + "".join(f"{f'alpha {alpha:g}':>12}" for alpha in alphas)]
        for density in dict.fromkeys(cell.density for cell in self.cells):
            row = [cell for cell in self.cells if cell.density == density]
            marks = (f"{cell.loss:>11.4f}" + ("*" if cell == self.best else " ") for cell in row)
            lines.append(f"{density:>9g}" + "".join(marks))
        return "\n".join(lines)


def sweep(
    adapter: LoraAdapter,
    *,
    densities: Sequence[float],
    alphas: Sequence[float],
    loss: Callable[[LoraAdapter], float],
    mode: str,
    lora_scale: float = 1.0,
    progress: Progress | None = None,
) -> SweepResult:
    """Measure every density and alpha on held-out data, as ComPEFT chooses its two settings.

    The adapter is made ternary once a density. In faithful mode alpha then multiplies its scale, which is
    squared in D; in fixed mode its least-squares gains. Calls `loss` O(densities * alphas) times.

    Args:
        loss: held-out loss of an adapter; NaN and infinity are kept in the table, and are never the best.
        mode: "faithful" or "fixed".
        lora_scale: see `faithful`; without effect in fixed mode.
        progress: called with (what is done, cells done, cells in all).

    Raises:
        ConfigError: no density or alpha, one out of range, or another mode.
        AdapterError: a malformed adapter, or no finite loss at all.
    """
    tell = progress or (lambda what, done, total: None)
    if mode not in _MODES:
        raise ConfigError(f"mode = {mode!r}, allowed: {', '.join(_MODES)}")
    if not densities or not alphas:
        raise ConfigError(f"{len(densities)} densities and {len(alphas)} alphas to try, at least one of each")
    for alpha in alphas:
        if not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha = {alpha!r}, allowed: a finite number above 0")
    cells: list[Cell] = []
    for density in densities:
        if mode == "faithful":
            made = faithful(adapter, density=density, alpha=1.0, lora_scale=lora_scale)
        else:
            made = fixed(adapter, density=density)
        for alpha in alphas:
            factor = alpha * alpha if mode == "faithful" else alpha
            tried = applied(adapter, scaled(made, factor))
            cells.append(Cell(density, alpha, kept(made), float(loss(tried))))
            tell(f"density {density:g}, alpha {alpha:g}", len(cells), len(densities) * len(alphas))
    if not any(math.isfinite(cell.loss) for cell in cells):
        raise AdapterError(f"none of {len(cells)} ternary forms of the adapter has a finite held-out loss")
    return SweepResult(mode, tuple(cells))


def applied(adapter: LoraAdapter, made: Mapping[str, Ternary]) -> LoraAdapter:
    """The adapter with its changes replaced by ternary ones, in float32."""
    return replace(adapter, pairs={name: part.pair() for name, part in made.items()})


def kept(made: Mapping[str, Ternary]) -> float:
    """Share of the signs that are not 0."""
    signs = [side for part in made.values() for side in (part.B, part.A)]
    return sum(int(side.count_nonzero()) for side in signs) / sum(side.numel() for side in signs)


def relative_error(adapter: LoraAdapter, made: Mapping[str, Ternary]) -> float:
    """||D - D^||_F / ||D||_F over all modules, 0 where both are zero. O((o + i) r^2) a module, in float64."""
    square = whole = 0.0
    for name, pair in adapter.pairs.items():
        part = made[name]
        B, A = pair.B.double(), pair.A.double()
        left = torch.cat([B, part.B.double() * part.gain.double()], 1)
        right = torch.cat([A, -part.A.double()], 0)
        # triangular factors, not Gram matrices: those lose half the digits of a small error
        square += float((_triangle(left) @ _triangle(right.mT).mT).square().sum())
        whole += float(((B.mT @ B) * (A @ A.mT)).sum())
    if whole <= 0:
        return math.inf if square > 0 else 0.0
    return math.sqrt(square / whole)


def _triangle(x: Tensor) -> Tensor:
    return torch.linalg.qr(x, mode="r").R
