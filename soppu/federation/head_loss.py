"""The cross-entropy of a frozen head, a few rows of logits at a time.

All logits of a batch would be the largest thing a client holds: labels x vocabulary, several times over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # at a time: about 10 bytes each


def row_losses(logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies (n,), nats in float32, of `logits(hidden)` (n, v) for `hidden` (n, d), `target` (n,).

    Gradients reach `hidden` alone: `logits` has to be frozen, and to treat each row by itself. The gradient
    is worked out beside the loss, so no logits are kept and none are computed twice.
    """
    return _Rows.apply(hidden, target, logits)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        gradients = [hidden[:0]]
        start, rows = 0, 1  # the first row tells how many numbers a row has
        while start < len(hidden):
            part = hidden[start : start + rows].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                given = logits(part)
            loss, change = _cross_entropy(given.detach(), target[start : start + rows])
            if needed:
                gradients += torch.autograd.grad(given, part, change.to(given.dtype))
            losses.append(loss)
            start, rows = start + rows, max(1, _LOGITS.get(hidden.device.type, 2**21) // given.shape[-1])
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outside: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outside[0].to(gradient.dtype)[:, None], None, None


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n,), and their gradient by the logits (n, v), float32. One copy of them, changed in place."""
    chances = logits.to(torch.float32, copy=True)
    chances -= chances.amax(-1, keepdim=True)
    wanted = chances.gather(-1, target[:, None])
    whole = chances.exp_().sum(-1, keepdim=True)
    loss = (whole.log() - wanted)[:, 0]
    chances /= whole
    return loss, chances.scatter_add_(-1, target[:, None], chances.new_full(target[:, None].shape, -1.0))
