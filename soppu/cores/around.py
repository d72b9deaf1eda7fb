"""A basis around the adapter that all users share: its own directions, and beside them random ones.

A user's numbers are best spent where layers write into the residual stream from most inputs, in few modules
of many directions each, and which directions those are matters little: what two users train freely hardly
overlaps. So such a basis needs nobody's own adapter. Cores begin exactly at the shared adapter, which stays
beside what a user trains.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError


def around(shared: LoraAdapter, *, k: int, modules: Collection[str], seed: int) -> CoreBasis:
    """Orthonormal directions: first those of the shared adapter, which are in common, then drawn ones.

    Args:
        k: directions a side that the chosen modules have beside those of the adapter, at most.
        modules: last parts of names, `down_proj` for one, all others have none; every module's if empty.

    Raises:
        AdapterError: the adapter has no such module, or is not of one rank.

    Cost: O(k^2 (o + i)) a module.
    """
    ends = {name: name.rpartition(".")[2] for name in shared.pairs}
    if odd := sorted(set(modules) - set(ends.values())):
        there = ", ".join(sorted(set(ends.values())))
        raise AdapterError(f"shared adapter: no module {', '.join(odd)}; there are {there}")
    ranks = {pair.rank for pair in shared.pairs.values()}
    if len(ranks) != 1:
        raise AdapterError(
            f"shared adapter: ranks {', '.join(map(str, sorted(ranks)))}, allowed: one for all"
        )
    draw, sides = torch.Generator().manual_seed(seed), {}
    for name, pair in sorted(shared.pairs.items()):
        more = k if not modules or ends[name] in modules else 0
        sides[name] = _side(pair.B, more, draw), _side(pair.A.mT, more, draw)
    return CoreBasis(sides, shared.base_model, shared.base_hash, shared.fan_in_fan_out, common=ranks.pop())


def _side(own: Tensor, more: int, draw: torch.Generator) -> Tensor:
    """Orthonormal columns: those of `own` (n, r) first, then as many as `more`, as far as there are n."""
    n, r = own.shape
    drawn = torch.randn(n, min(more, n - r), generator=draw)
    return torch.linalg.qr(torch.cat([own.detach().float().cpu(), drawn], 1))[0].contiguous()
