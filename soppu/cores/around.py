"""A basis around the adapter that all users share: its own directions, in common, and others beside them.

Cores in it begin exactly at the shared adapter, and what a user trains is beside that. The other directions
may be of nobody's text (`basis.drawn`), or learnt (`soppu.federation.learn_basis`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from soppu import base_identity
from soppu.adapter import LoraAdapter
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError


def around(shared: LoraAdapter, beside: CoreBasis) -> CoreBasis:
    """The shared adapter's directions, orthonormal, and after them those of `beside`, as they are.

    Args:
        beside: of some of the adapter's modules, the others have the adapter's directions alone; as many of a
            side as there is room for.

    Raises:
        AdapterError: they are of other models, or `beside` of a module that the adapter lacks, or has in
            another shape; or the adapter is not of one rank.

    Cost: O(r^2 (o + i)) a module.
    """
    base_identity.check(shared.base, beside.base, who="shared adapter", whose="the directions beside are for")
    shapes, wanted = shared.shapes(), beside.module_shapes()
    for name, (o, i) in wanted.items():
        there = (shapes[name][0], shapes[name][2]) if name in shapes else None
        if there != (o, i):
            raise AdapterError(
                f"{name}: the shared adapter has {there or 'no such module'}, needed: {(o, i)}"
            )
    ranks = {pair.rank for pair in shared.pairs.values()}
    if len(ranks) != 1:
        raise AdapterError(
            f"shared adapter: ranks {', '.join(map(str, sorted(ranks)))}, allowed: one for all"
        )
    sides = {}
    for name, pair in sorted(shared.pairs.items()):
        more = beside.sides.get(name, (pair.B[:, :0], pair.A.mT[:, :0]))
        sides[name] = _side(pair.B, more[0]), _side(pair.A.mT, more[1])
    return CoreBasis(sides, shared.base_model, shared.base_hash, shared.fan_in_fan_out, common=ranks.pop())


def with_own(shared: Tensor, own: Tensor) -> Tensor:
    """A core (k_out, k_in) whose last rows and columns are a user's own; the rest is as in `shared`."""
    whole = shared.clone()
    whole[len(shared) - len(own) :, shared.shape[1] - own.shape[1] :] = own
    return whole


def _side(own: Tensor, more: Tensor) -> Tensor:
    """Columns (n, r + m), at most n."""
    columns = torch.linalg.qr(own.detach().float().cpu())[0]
    return torch.cat([columns, more.detach().float().cpu()[:, : max(0, len(own) - columns.shape[1])]], 1)
