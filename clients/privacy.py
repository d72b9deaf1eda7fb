"""Clipping and noise before anything leaves, by Flower's own functions: those of its LocalDpMod.

The mod itself clips all tensors of a message against all that came; ours brings the emulator's LoRA too, and
in the personal round takes back more than it brought.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.supercore.differential_privacy import (
    add_gaussian_noise_inplace,
    compute_clip_model_update,
    get_norm,
)
from torch import Tensor

from soppu.sharing import SharingSettings


def hidden(
    state: Mapping[str, Tensor], begun: Mapping[str, Tensor], settings: SharingSettings
) -> dict[str, Tensor]:
    """`begun` and the change from it, clipped to `dp_clip`, and noise of `dp_noise` clipping norms a number.

    Args:
        begun: nothing in it may depend on the user's text, or clipping the change from it bounds nothing.
    """
    new = [tensor.float().numpy() for tensor in state.values()]
    old = [begun[name].float().numpy() for name in state]
    if get_norm([after - before for after, before in zip(new, old, strict=True)]):  # Flower divides by it
        compute_clip_model_update(new, old, settings.dp_clip)
    new = [array.copy() for array in new]
    add_gaussian_noise_inplace(new, settings.dp_noise * settings.dp_clip)
    return {name: torch.from_numpy(array) for name, array in zip(state, new, strict=True)}
