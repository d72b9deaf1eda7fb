"""A basis around the adapter that all users share: its own directions, and beside them random ones.

A user's numbers are best spent where layers write into the residual stream from most inputs, in few modules
of many directions each, and which directions those are matters little: what two users train freely hardly
overlaps. So such a basis needs nobody's own adapter. Cores begin exactly at the shared adapter.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError


def around(shared: LoraAdapter, *, k: int, modules: Collection[str], seed: int) -> CoreBasis:
    """Orthonormal directions: first those of the shared adapter, then drawn ones.

    Args:
        k: directions a side that the chosen modules have at most; the others keep those of the adapter.
        modules: last parts of names, `down_proj` for one; all of the adapter's if empty.

    Raises:
        AdapterError: the adapter has no such module, or a chosen one has a larger rank than `k`.

    Cost: O(k^2 (o + i)) a module.
    """
    ends = {name: name.rpartition(".")[2] for name in shared.pairs}
    if odd := sorted(set(modules) - set(ends.values())):
        there = ", ".join(sorted(set(ends.values())))
        raise AdapterError(f"shared adapter: no module {', '.join(odd)}; there are {there}")
    draw, sides = torch.Generator().manual_seed(seed), {}
    for name, pair in sorted(shared.pairs.items()):
        wide = k if not modules or ends[name] in modules else pair.rank
        if wide < pair.rank:
            raise AdapterError(
                f"{name}: the shared adapter has rank {pair.rank}, a basis of {k} cannot hold it"
            )
        sides[name] = _side(pair.B, wide, draw), _side(pair.A.mT, wide, draw)
    return CoreBasis(sides, shared.base_model, shared.base_hash, shared.fan_in_fan_out)


def _side(own: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """(n, at most k), orthonormal: the columns of `own` come first."""
    n, r = own.shape
    drawn = torch.randn(n, max(0, min(k, n) - r), generator=draw)
    return torch.linalg.qr(torch.cat([own.detach().float().cpu(), drawn], 1))[0].contiguous()
