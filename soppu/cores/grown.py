"""A basis with more directions: what some adapters have outside it, after all that it had.

Who is told in the old basis is told exactly in this one; who was not spanned comes nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.basis import CoreBasis
from soppu.cores.projecting import check_fits
from soppu.errors import AdapterError

_NOTHING = 1e-4  # of an adapter at a module: what float32 leaves outside of one that is spanned


def grown(basis: CoreBasis, adapters: Sequence[LoraAdapter], *, by: int) -> CoreBasis:
    """The same columns, and behind them at most `by` a side and module, orthonormal and outside their span.

    They are the leading left, and right, singular vectors of what the basis leaves of all adapters together
    (HOSVD: De Lathauwer et al. 2000), each adapter weighing the same at a module. With as many as their
    ranks come to the adapters are spanned. Modules that the basis lacks it goes on to lack; where nothing is
    left, or there is no room, a side stays as it is.

    Raises:
        AdapterError: an adapter of another base model, or of other shapes; `by` below 1.

    Cost: O((o + i)(k + n r)^2) a module, for n adapters of rank r.
    """
    if by < 1:
        raise AdapterError(f"a basis is to grow by {by} directions, allowed: 1 or more")
    for adapter in adapters:
        check_fits(adapter, basis, who="adapter")
    sides = {}
    for name, (u, v) in basis.sides.items():
        pairs = [one.pairs[name] for one in adapters if name in one.pairs]
        halves = [_halves(pair) for pair in pairs]
        sides[name] = _side(u, [left for left, _ in halves], by), _side(v, [right for _, right in halves], by)
    return replace(basis, sides=sides)


def _halves(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """B A of norm 1, as what its columns, and its rows, are combinations of: (o, r) and (i, r), float64."""
    B, A = pair.B.detach().cpu().double(), pair.A.detach().cpu().double()
    out, inn = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    norm = torch.linalg.matrix_norm(out @ inn.mT).clamp(min=torch.finfo(torch.float64).tiny)
    return B @ inn.mT / norm, A.mT @ out.mT / norm


def _side(side: Tensor, found: Sequence[Tensor], by: int) -> Tensor:
    """Columns (n, k + m), m at most `by`: the leading ones of `found`, each (n, r), that `side` lacks."""
    if not found or side.shape[1] >= len(side):
        return side
    known = torch.linalg.qr(side.double())[0]
    left = torch.cat(list(found), 1)
    for _ in range(2):  # once leaves round-off of what was taken away
        left = left - known @ (known.mT @ left)
    more, lengths, _ = torch.linalg.svd(left, full_matrices=False)
    room = min(by, len(side) - side.shape[1])
    kept = more[:, :room][:, lengths[:room] > _NOTHING]
    return torch.cat([side, kept.float().to(side.device)], 1)
