"""The FedBiOT split of a decoder, and the one place where layer numbers are translated.

A decoder of L layers is cut into a bottom of L - a layers and the adapter, its last a layers. The emulator
is the bottom thinned uniformly (first and last always kept). Full-model numbers are used everywhere
outside this file; a model that holds only some layers has numbers of its own, and `LayerPlan` maps them.

Source: FedBiOT (Wu et al., KDD 2024), section 3; uniform layer drop as in Offsite-Tuning (arXiv 2302.04870).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError, UnsupportedModel
from soppu.module_names import split_layer

if TYPE_CHECKING:  # loading it takes seconds and 110 MB, in processes that hold no model too
    from transformers import PreTrainedModel

    from soppu.config import Config

_LLAMA = ("q_proj", "v_proj", "o_proj", "down_proj")
# model_type -> path of the decoder layers, and the projections a LoRA adapts by default.
SUPPORTED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.layers", _LLAMA)),
    "gpt_neox": ("gpt_neox.layers", ("query_key_value", "dense", "dense_4h_to_h")),
    "opt": ("model.decoder.layers", ("q_proj", "v_proj", "out_proj", "fc2")),
    "gpt2": ("transformer.h", ("c_attn", "c_proj")),
}


@dataclass(frozen=True)
class LayerPlan:
    """Which layers are whose. The contract between server, clients and registry."""

    model_type: str  # family of the base model, a key of `SUPPORTED`
    base_hash: str  # of the base model's files
    layers: int  # L, decoder layers of the full model
    adapter_layers: int  # a, the last layers, which users train
    kept: tuple[int, ...]  # full-model numbers of the bottom layers the emulator keeps, ascending
    target_modules: tuple[str, ...]  # names of the projections that carry LoRA factors

    @property
    def path(self) -> str:
        """Where the decoder layers live in the model, `model.layers` for a Llama."""
        return SUPPORTED[self.model_type][0]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the family stores weights as (i, o)."""
        return self.model_type == "gpt2"

    @property
    def adapter(self) -> tuple[int, ...]:
        """Full-model numbers of the adapter layers."""
        return tuple(range(self.layers - self.adapter_layers, self.layers))

    @property
    def bottom(self) -> tuple[int, ...]:
        """Full-model numbers of everything below the adapter."""
        return tuple(range(self.layers - self.adapter_layers))

    @property
    def emulator(self) -> tuple[int, ...]:
        """Full-model numbers of what a client holds: the kept layers, then the adapter."""
        return self.kept + self.adapter

    @property
    def hash(self) -> str:
        """SHA-256 over the plan, 64 hex: clients refuse to train on another one."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as it travels to clients."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("kept", "target_modules")})


def make_plan(
    model: PreTrainedModel,
    *,
    base_hash: str,
    adapter_layers: int,
    drop_ratio: float,
    target_modules: Sequence[str] = (),
) -> LayerPlan:
    """Cut a model's decoder.

    Args:
        model: the full model; only its configuration and module names are read.
        drop_ratio: share of the bottom layers the emulator drops; 0 keeps the model whole.
        target_modules: projections to adapt; empty takes the family's default.

    Raises:
        UnsupportedModel: another family, more adapter layers than the decoder can spare, or target
            modules that the layers do not have.
    """
    family = model.config.model_type
    layers = len(decoder_layers(model))
    bottom = layers - adapter_layers
    if bottom < 2:
        raise UnsupportedModel(
            f"plan.adapter_layers: found {adapter_layers}, at most {layers - 2} of {layers} layers"
        )
    keep = min(bottom, max(2, round(bottom * (1 - drop_ratio))))
    stride = (bottom - 1) / (keep - 1)
    plan = LayerPlan(
        model_type=family,
        base_hash=base_hash,
        layers=layers,
        adapter_layers=adapter_layers,
        kept=tuple(int(index * stride + 1e-9) for index in range(keep)),
        target_modules=tuple(target_modules) or SUPPORTED[family][1],
    )
    target_shapes(model, plan)
    return plan


def configured_plan(config: Config, model: PreTrainedModel, *, base_hash: str) -> LayerPlan:
    """The cut that a configuration asks for. See `make_plan`."""
    return make_plan(
        model,
        base_hash=base_hash,
        adapter_layers=config.plan.adapter_layers,
        drop_ratio=config.plan.drop_ratio,
        target_modules=config.lora.target_modules,
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers. UnsupportedModel for families whose layers we cannot split."""
    family = model.config.model_type
    if family not in SUPPORTED:
        raise UnsupportedModel(f"model type {family!r} cannot be split; supported: {', '.join(SUPPORTED)}")
    found = model.get_submodule(SUPPORTED[family][0])
    expected = model.config.num_hidden_layers
    if not isinstance(found, nn.ModuleList) or len(found) != expected:
        raise UnsupportedModel(f"{family}: {SUPPORTED[family][0]} does not hold {expected} layers")
    return found


def target_shapes(
    model: PreTrainedModel, plan: LayerPlan, numbers: Sequence[int] | None = None
) -> dict[str, tuple[int, int]]:
    """Full-model name -> (o, i) of every LoRA target in some layers, read off the full model.

    Args:
        numbers: full-model layer numbers; the adapter layers if left out.

    Raises:
        UnsupportedModel: a target module is not there, or has no weight matrix.
    """
    shapes = {}
    for index in plan.adapter if numbers is None else numbers:
        layer = model.get_submodule(f"{plan.path}.{index}")
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if name.rsplit(".", 1)[-1] in plan.target_modules and weight is not None and weight.ndim == 2:
                o, i = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
                shapes[f"{plan.path}.{index}.{name}"] = (int(o), int(i))
    missing = sorted(set(plan.target_modules) - {name.rsplit(".", 1)[-1] for name in shapes})
    if missing:
        raise UnsupportedModel(f"lora.target_modules: no {', '.join(missing)} in {plan.model_type} layers")
    return shapes


def with_layers(model: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """A model of some of the layers, sharing every tensor with `model`.

    The modules are copies, because a layer knows its own number (the KV cache is indexed by it); parameters
    and buffers are the same tensors. Numbers baked into GPT-2's attention scale are left as they were.
    Cost: O(modules of these layers), no weights are copied.
    """
    kept = set(numbers)
    left_out = [layer for number, layer in enumerate(decoder_layers(model)) if number not in kept]
    shared = {id(held): held for held in (*model.parameters(), *model.buffers(), *left_out)}
    clone: PreTrainedModel = copy.deepcopy(model, shared)
    layers = decoder_layers(clone)
    clone.set_submodule(SUPPORTED[model.config.model_type][0], nn.ModuleList(layers[n] for n in numbers))
    for own, number in enumerate(numbers):
        for module in layers[number].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = own  # type: ignore[assignment]
    config = clone.config
    for name in ("layer_types", "attention_layers"):
        value = vars(config).get(name)
        if isinstance(value, list) and len(value) == len(layers):
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    return clone


def renumber(
    adapter: LoraAdapter, path: str, mapping: Mapping[int, int], *, who: str = "adapter"
) -> LoraAdapter:
    """Translate layer numbers: `path.<n>.…` becomes `path.<mapping[n]>.…`.

    Raises:
        AdapterError: a module is not under `path`, or its number is not in `mapping`. This is how keys
            with an emulator's numbers fail loudly at the full model instead of landing on a wrong layer.
    """
    named = renumbered(adapter.pairs, path, mapping, who=who)
    pairs = {named[name]: pair for name, pair in adapter.pairs.items()}
    return LoraAdapter(pairs, adapter.base_model, adapter.base_hash, adapter.fan_in_fan_out)


def renumbered(
    names: Iterable[str], path: str, mapping: Mapping[int, int], *, who: str = "adapter"
) -> dict[str, str]:
    """Module name -> the same with its layer's number translated. Raises as `renumber` does."""
    found = {}
    for name in names:
        parts = split_layer(name)
        if parts is None or parts[0] != f"{path}." or parts[1] not in mapping:
            raise AdapterError(f"{who}: {name}: not one of {path}.{{{', '.join(map(str, mapping))}}}")
        found[name] = f"{path}.{mapping[parts[1]]}{parts[2]}"
    return found


def to_own(
    adapter: LoraAdapter, plan: LayerPlan, numbers: Sequence[int], *, who: str = "adapter"
) -> LoraAdapter:
    """Full-model numbers -> the numbers inside a model made by `with_layers(model, numbers)`."""
    return renumber(adapter, plan.path, {number: own for own, number in enumerate(numbers)}, who=who)


def to_full(
    adapter: LoraAdapter, plan: LayerPlan, numbers: Sequence[int], *, who: str = "adapter"
) -> LoraAdapter:
    """The numbers inside a model made by `with_layers(model, numbers)` -> full-model numbers."""
    return renumber(adapter, plan.path, dict(enumerate(numbers)), who=who)


def replace_parameters(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Give the model frozen parameters of its own: what `change` makes of each. Tied ones stay tied."""
    changed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in changed:
                    changed[id(old)] = nn.Parameter(change(old.detach()), requires_grad=False)
                module._parameters[name] = changed[id(old)]


def replace_buffers(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Likewise for its buffers."""
    for module in model.modules():
        module._buffers.update(
            {name: change(old) for name, old in module._buffers.items() if old is not None}
        )


class _NoEmbedding(nn.Module):
    """In place of an embedding whose output nobody reads: its shape, without its memory."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((*ids.shape, self.width), dtype=self.dtype, device=ids.device)


class TopModel:
    """The adapter layers, the final norm and the head, fed with cached hidden states.

    Works for every family: the hidden states replace the first argument of the first layer, so that
    embeddings and learned positions are not applied a second time.

    Args:
        layers: where the adapter layers are in `model`; their full-model numbers if left out.
        dtype: what it computes in. Weights of another one are copied, so float32 over bfloat16 layers
            costs four bytes for each of their numbers, and of the head's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: LayerPlan,
        *,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = with_layers(model, plan.adapter if layers is None else layers)
        embedding: Any = self.model.get_input_embeddings()
        width = int(embedding.weight.shape[-1])
        self.model.set_input_embeddings(_NoEmbedding(width, dtype))
        replace_parameters(self.model, lambda weight: weight.to(dtype))  # nothing is copied that is so

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Numbers of one token's state."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.width)

    def hidden(self, below: Tensor, mask: Tensor) -> Tensor:
        """Final-norm output (b, t, d) from the bottom's output `below` (b, t, d) and the mask (b, t)."""
        weight = next(self.model.parameters())
        below, mask = below.to(weight), mask.to(weight.device)
        decoder = self.model.get_decoder()
        first = decoder_layers(self.model)[0]

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (below, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": below}

        hook = first.register_forward_pre_hook(feed, with_kwargs=True)
        try:
            # Token ids only give the shape here: what the embedding makes of them is replaced.
            ids = torch.zeros(below.shape[:2], dtype=torch.long, device=below.device)
            return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            hook.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., v) of final-norm outputs (..., d)."""
        return self.model.get_output_embeddings()(hidden)


def bottom_states(bottom: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Output (b, t, d) of the last bottom layer, before any final norm, on the bottom's device."""
    device = next(bottom.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    captured: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)

    hook = decoder_layers(bottom)[-1].register_forward_hook(keep)
    try:
        bottom.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    return captured[0]
