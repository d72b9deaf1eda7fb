"""U and V that follow gradients which come from elsewhere: Adam where the average is, none where text is.

Users differ by far more than they have in common. If each took Adam's steps in U and V and the results were
averaged, most would be lost: Adam makes what is one user's alone as large as what all agree on. Averaged
first, it is what users agree on that Adam makes large.

Source: FedOpt, as FedAdam (Reddi et al., ICLR 2021), the change of a user being one step along the gradients
that add up while their core is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from soppu.cores.basis import CoreBasis
from soppu.federation.trained import Sides

_BETAS = (0.9, 0.99)  # the source's
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's optimiser


class BasisAdam:
    """A basis under way.

    Args:
        start: copied.
        rate: step size; columns are of length 1 as they are drawn.
    """

    def __init__(self, start: CoreBasis, *, rate: float) -> None:
        self._start = start
        self._sides: Sides = {
            name: (u.detach().clone(), v.detach().clone()) for name, (u, v) in start.sides.items()
        }
        flat = [side for name in sorted(self._sides) for side in self._sides[name]]
        self._optimizer = torch.optim.AdamW(flat, lr=rate, betas=_BETAS, weight_decay=0.0)

    def step(self, gradient: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """One step against the users' mean gradient, whose scale is of no matter. O(k (o + i)) a module."""
        for name, sides in self._sides.items():
            for side, slope in zip(sides, gradient[name], strict=True):
                side.grad = slope.to(side.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def basis(self) -> CoreBasis:
        """As it is now; not orthonormal, and told by other numbers after every step."""
        return replace(self._start, sides={n: (u.clone(), v.clone()) for n, (u, v) in self._sides.items()})

    def moments(self) -> dict[str, Tensor]:
        """What Adam remembers, by names of its own."""
        held = self._optimizer.state_dict()["state"]
        return {f"{index}.{name}": held[index][name] for index in held for name in _MOMENTS}

    def resume(self, moments: Mapping[str, Tensor]) -> None:
        """Go on with what `moments` gave. KeyError if they are of another basis."""
        groups = self._optimizer.state_dict()["param_groups"]
        count = len(groups[0]["params"]) if moments else 0
        state = {index: {name: moments[f"{index}.{name}"] for name in _MOMENTS} for index in range(count)}
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
