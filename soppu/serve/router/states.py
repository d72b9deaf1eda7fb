"""Pooled states of prompts: the mean over a prompt's tokens of what leaves the layers that nobody adapts.

These layers are everybody's, so a state says nothing of whose adapter would answer, and one forward of them
stands for every arm.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soppu.federation import emulator
from soppu.serve.router.measured import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last(ids: Sequence[int], *, special: int, limit: int) -> list[int]:
    """A prompt as it is pooled: of more than `limit` tokens the last, behind its `special` first ones.

    The same cut that prompts have in training text, so that what is asked is like what was measured.
    """
    head = list(ids[:special])
    return head + list(ids[special:])[-(limit - len(head)) :]


def pooled(states: Tensor) -> Floats:
    """(d,) mean of the states (t, d) of a prompt's tokens."""
    mean: Floats = states.float().mean(0).double().cpu().numpy()
    return mean


class Pool:
    """The first `layers` layers of a served model, which share its tensors. Any thread may call it."""

    def __init__(self, model: PreTrainedModel, *, layers: int) -> None:
        self._bottom = emulator.with_layers(model, range(layers))
        self._one_at_a_time = threading.Lock()  # the states are caught by a hook of the module

    def __call__(self, ids: Sequence[int]) -> Floats:
        """(d,) of one prompt. Cost: one forward of these layers over its tokens."""
        row = torch.tensor([list(ids)], dtype=torch.long)
        with self._one_at_a_time, torch.inference_mode():
            states = emulator.bottom_states(self._bottom, row, torch.ones_like(row))
        return pooled(states[0])
