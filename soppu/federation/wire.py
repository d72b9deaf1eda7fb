"""Adapters as flat tensor dictionaries: what travels between clients and server.

Always full-model names, always float32, scale folded. A prefix keeps the emulator's own LoRA and the
users' LoRA apart in one record, because Flower's privacy mods expect exactly one array record a message.
A user's own adapter may also travel in another form, see `soppu.federation.wire_ternary`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError

EMULATOR = "emulator/"
USER = ""
FLOAT32, TERNARY = "float32", "ternary"  # the forms of a user's own adapter
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def to_state(adapter: LoraAdapter, *, prefix: str = USER) -> dict[str, Tensor]:
    """Adapter -> {prefix + module.lora_X.weight: tensor (float32, contiguous)}."""
    return {
        f"{prefix}{name}.lora_{side}.weight": getattr(pair, side).detach().float().contiguous()
        for name, pair in adapter.pairs.items()
        for side in ("A", "B")
    }


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(users' part, emulator's part with its prefix taken off)."""
    emulator = {k.removeprefix(EMULATOR): v for k, v in state.items() if k.startswith(EMULATOR)}
    return {k: v for k, v in state.items() if not k.startswith(EMULATOR)}, emulator


def from_state(
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    who: str,
    base_model: str = "",
    base_hash: str = "",
    fan_in_fan_out: bool = False,
) -> LoraAdapter:
    """Tensors -> adapter, with everything checked that a sender could get wrong.

    Args:
        expected: full-model name -> (o, i) of every module that has to be there, and no other.
        rank: the LoRA rank agreed on.
        who: the sender, named in the message.

    Raises:
        AdapterError: a missing or unknown tensor, a wrong shape or kind of number, NaN or Inf.
    """
    check(state, tensors(expected, rank, rank), who=who)
    pairs = {
        name: LoraPair(state[f"{name}.lora_A.weight"].float(), state[f"{name}.lora_B.weight"].float())
        for name in expected
    }
    return LoraAdapter(pairs, base_model, base_hash, fan_in_fan_out)


def tensors(shapes: Mapping[str, tuple[int, int]], a: int, b: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> shape, where A has `a` rows and B has `b` columns; a factor of none is left out."""
    sides = (("A", a), ("B", b))
    return {
        f"{name}.lora_{side}.weight": (rank, i) if side == "A" else (o, rank)
        for name, (o, i) in shapes.items()
        for side, rank in sides
        if rank
    }


def check(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, int]], *, who: str) -> None:
    """Hold tensors against what has to be there: exactly these names and shapes, finite numbers.

    Raises:
        AdapterError: a missing or unknown tensor, a wrong shape or kind of number, NaN or Inf.
    """
    if missing := sorted(wanted.keys() - state.keys()):
        raise AdapterError(f"{who}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise AdapterError(f"{who}: tensor {unknown[0]} is not part of the plan ({len(unknown)} in all)")
    for key, shape in wanted.items():
        tensor = state[key]
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{who}: {key}: shape {tuple(tensor.shape)}, the plan says {shape}")
        if not tensor.is_floating_point():
            raise AdapterError(f"{who}: {key}: holds {tensor.dtype}, expected floating-point numbers")
        # as float32, which is what it becomes: a float64 may be finite and yet too large for that
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{who}: {key}: holds NaN or Inf")


def loose_from_state(state: Mapping[str, Tensor], *, base_hash: str = "") -> LoraAdapter:
    """Tensors -> adapter without a plan to hold them against: for what this process itself wrote."""
    names = sorted({match["module"] for key in state if (match := _KEY.fullmatch(key))})
    pairs = {name: LoraPair(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}
    return LoraAdapter(pairs, base_hash=base_hash)
