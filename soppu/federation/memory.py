"""What a federation takes in memory, worked out before anything is started, and which setting to change.

    client = process + top + states + max(emulator + pass, step)
    server = process + model + emulator's copy in 4 bits + top + public states + pass and step of alignment

`top` and the products are in `compute_dtype`, the rest in `frozen_dtype`. States are those of the users whose
states a client keeps, or whose cores it trains together. Activations are counted per token and layer: about
twenty vectors of the model's width and eight of its widest projection where gradients are needed, half of a
single layer's where not. Meant to be right within a factor of two; what the process itself takes is measured,
450 MB with torch, transformers and Flower.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from soppu import models
from soppu.config import Config
from soppu.devices import free_bytes
from soppu.errors import ConfigError
from soppu.federation import emulator
from soppu.federation.emulator import LayerPlan
from soppu.federation.nf4 import NF4
from soppu.federation.train import tokens_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEP_STATES = 4  # users whose states a client keeps whatever they take
KEEP_BYTES = 64 * 2**20  # of states: as many more users as go in here
PROCESS = 450 * 2**20
_CONTEXT = 500 * 2**20  # of CUDA, a process
_LOGITS = 20 * 2**20  # soppu/federation/head_loss.py
_NF4_BYTES = 0.52
_LEAST_TOGETHER = 4  # users of a simulated node that trains cores
_PASS = 8  # examples that states are made of at once
_CURES = {
    "emulator": "plan.drop_ratio (higher), frozen_dtype (bfloat16, nf4)",
    "top": "compute_dtype (bfloat16), plan.adapter_layers (fewer)",
    "states": "data.train_examples, data.validation_examples, data.max_tokens or federation.together (fewer)",
    "pass": "data.max_tokens (fewer)",
    "step": "data.max_tokens or federation.batch_size (fewer)",
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and widths, of a model."""

    layer: int  # of one decoder layer, on the mean
    head: int
    embedding: int  # and all else below the layers
    tied: bool
    width: int
    widest: int  # outputs of the widest projection
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel, plan: LayerPlan) -> Sizes:
        """Read off a model, which may be without weights."""
        layers = emulator.decoder_layers(model)
        in_layers = sum(weight.numel() for weight in layers.parameters())
        head = int(model.get_output_embeddings().weight.numel())
        shapes = models.linear_shapes(layers)
        return cls(
            layer=in_layers // len(layers),
            head=head,
            embedding=sum(w.numel() for w in model.get_decoder().parameters()) - in_layers,
            tied=bool(model.config.tie_word_embeddings),
            width=int(model.config.hidden_size),
            widest=max(o for o, _ in shapes.values()),
            vocabulary=int(model.config.vocab_size),
        )


def client_parts(config: Config, plan: LayerPlan, sizes: Sizes) -> dict[str, int]:
    """Bytes of what a client holds, by name; the emulator and its pass are not there at once with a step."""
    frozen, compute = _bytes(config)
    layer = sizes.layer * (_NF4_BYTES if config.frozen_dtype == NF4 else frozen)
    shared = sizes.tied and frozen == compute
    data, tokens = config.data, config.data.max_tokens
    texts = data.train_examples + data.validation_examples
    one_user = texts * tokens * sizes.width * frozen
    kept = max(KEEP_STATES, KEEP_BYTES // one_user)
    at_once = config.federation.batch_size * tokens
    if config.federation.form == "core":
        kept = config.federation.together
        at_once = max(at_once, min(kept * at_once, tokens_at_once(sizes.width, kept, on="cpu")))
    activations = 20 * sizes.width + 8 * sizes.widest
    return {
        "emulator": int(len(plan.kept) * layer + (0 if shared else sizes.embedding * frozen)),
        "pass": _PASS * tokens * activations * frozen // 2,
        "top": (plan.adapter_layers * sizes.layer + sizes.head) * compute,
        "states": one_user * min(kept, len(data.users) or 1),
        "step": at_once * plan.adapter_layers * activations * compute + _LOGITS,
    }


def client_bytes(parts: Mapping[str, int]) -> int:
    """The most a client takes at a time, but for its process."""
    return parts["top"] + parts["states"] + max(parts["emulator"] + parts["pass"], parts["step"])


def server_bytes(config: Config, plan: LayerPlan, sizes: Sizes) -> int:
    """The most that the server takes, but for its process."""
    frozen, compute = _bytes(config)
    align, layers = config.align, len(plan.kept)
    model = plan.layers * sizes.layer + sizes.embedding + (0 if sizes.tied else sizes.head)
    top = 0 if frozen == compute else (plan.adapter_layers * sizes.layer + sizes.head) * compute
    copy = layers * sizes.layer * _NF4_BYTES if config.frozen_dtype == NF4 else 0
    states = align.examples * align.max_tokens * sizes.width * frozen
    tokens = align.batch_size * align.max_tokens
    activations = tokens * (20 * sizes.width + 8 * sizes.widest)
    step = activations * (layers * frozen + plan.adapter_layers * compute) + 5 * tokens * sizes.vocabulary * 4
    return int(model * frozen + top + copy + states + step)


def check(config: Config, model: PreTrainedModel, plan: LayerPlan) -> None:
    """Refuse a simulation that this machine cannot hold.

    Args:
        model: the base model, which may be without weights.

    Raises:
        ConfigError: GPUs are asked for that are not there, or memory is short; it names the keys to change.
    """
    gpus = config.federation.client_gpus
    check_gpus(config)
    sizes = Sizes.of(model, plan)
    parts = client_parts(config, plan, sizes)
    here = PROCESS + (0 if gpus else client_bytes(parts))
    at_once = clients_at_once(config)
    server = PROCESS + server_bytes(config, plan, sizes)
    free = free_bytes(torch.device("cpu"))
    if server + at_once * here > free:
        raise ConfigError(
            f"a server of {_gb(server)} and {at_once} clients at once of {_gb(here)} each take more than the"
            f" {_gb(free)} that are free; {_cure(parts, 'federation.client_cpus', at_once)}"
        )
    if gpus:
        there = _CONTEXT + client_bytes(parts)
        on_one = max(1, math.floor(1 / gpus))
        least = min(free_bytes(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))
        if on_one * there > least:
            raise ConfigError(
                f"{on_one} clients of {_gb(there)} each on a GPU take more than its free {_gb(least)};"
                f" {_cure(parts, 'federation.client_gpus', on_one)}"
            )


def check_gpus(config: Config) -> None:
    """Refuse GPUs for simulated clients that are not there. Ray would wait for them for ever."""
    federation, found = config.federation, torch.cuda.device_count()
    gpus, device = federation.client_gpus, federation.client_device
    if gpus > found:
        raise ConfigError(f"federation.client_gpus = {gpus}, this machine has {found} CUDA devices")
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"federation.client_gpus = {gpus}, allowed: a share up to 1, or a whole number")
    if device.startswith("cuda") and not gpus:
        raise ConfigError(
            f"federation.client_device = {device!r}: a simulated client sees a GPU only where"
            " federation.client_gpus is above 0"
        )
    if device.startswith("cuda:") and device != "cuda:0":
        raise ConfigError(
            f"federation.client_device = {device!r}: a simulated client sees the GPU it is given as cuda:0;"
            " allowed: auto, cpu, cuda"
        )


def clients_at_once(config: Config) -> int:
    """How many simulated clients run at a time on this machine."""
    federation = config.federation
    most = max(1, (os.cpu_count() or 1) // federation.client_cpus)
    if federation.client_gpus:
        most = min(most, max(1, int(torch.cuda.device_count() / federation.client_gpus)))
    return max(1, min(most, len(config.data.users) or most))


def core_nodes(config: Config) -> int:
    """How many simulated nodes train the cores of a run's users: as many as work at a time, where that leaves
    each of them some users to train together.
    """
    return min(clients_at_once(config), max(1, len(config.data.users) // _LEAST_TOGETHER))


def _bytes(config: Config) -> tuple[int, int]:
    compute = models.computing(config.compute_dtype, config.frozen_dtype)
    return models.dtype_of(config.frozen_dtype).itemsize, compute.itemsize


def _cure(parts: Mapping[str, int], fewer: str, at_once: int) -> str:
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    keys = [f"{fewer} (higher: fewer at once)"] if at_once > 1 else []
    keys += [f"{_CURES[name]}, for {name}: {_gb(parts[name])}" for name in largest]
    return f"change {'; or '.join(keys)}"


def _gb(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
