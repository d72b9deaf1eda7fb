"""A client's part of a model: the emulator and the adapter layers, read alone from the model's files.

Nothing of a layer that was dropped is ever read, and the emulator's weights are there only while states are
made: what a client needs is the larger of the two, never the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from soppu import models
from soppu.errors import ModelError
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.nf4 import NF4, quantise
from soppu.federation.tensor_files import TensorFiles, empty
from soppu.models import BaseModel
from soppu.module_names import split_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from soppu.adapter import LoraAdapter


class ClientPart:
    """The layers of one plan on one device.

    Args:
        dtype: of the frozen weights, as `models.dtype_of`.
        compute: what the adapter layers compute in.

    Raises:
        ModelError: the files do not hold a tensor that is needed.
        UnsupportedModel: the plan does not fit the model, or its layers cannot be quantised.
        MissingExtra: "nf4" without bitsandbytes.
    """

    def __init__(
        self,
        base: BaseModel,
        plan: LayerPlan,
        *,
        dtype: str = "float32",
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.device, self._dtype = plan, torch.device(device), dtype
        whole = empty(base)
        self._files = TensorFiles(base, whole)
        self._tied: dict[str, str] = dict(whole.all_tied_weights_keys)
        emulator.replace_buffers(whole, lambda buffer: buffer.to(self.device))
        self.shapes = emulator.target_shapes(whole, plan)
        self._bottom = emulator.with_layers(whole, plan.kept)
        self._head: dict[str, Tensor] = {}
        self.top = self._read_top(whole, compute)

    @contextmanager
    def bottom(self, adapter: LoraAdapter | None = None) -> Iterator[PreTrainedModel]:
        """The emulator with its weights, for the length of a with-block.

        Args:
            adapter: the emulator's own LoRA, numbered as the emulator is.

        Cost: none for weights that are used as they lie in the files, else one pass over them.
        """
        if any(weight.is_meta for weight in self._bottom.get_decoder().parameters()):
            self._read_bottom()
        try:
            with attached(self._bottom, adapter):
                yield self._bottom
        finally:
            if self._dtype != NF4:  # that is small, and takes longer to make than to use
                emulator.replace_parameters(self._bottom, lambda weight: weight.to("meta"))

    def _read_top(self, whole: PreTrainedModel, compute: torch.dtype) -> TopModel:
        plan, model = self.plan, emulator.with_layers(whole, self.plan.adapter)
        unread = set(model.get_input_embeddings().modules())  # TopModel has no use for it
        self._read({path: m for path, m in model.named_modules() if m not in unread}, plan.adapter)
        top = TopModel(model, plan, layers=range(plan.adapter_layers), dtype=compute)
        head = top.model.get_output_embeddings().weight
        if head.dtype == models.dtype_of(self._dtype):  # a tied embedding is the same tensor then
            self._head = {source: head.detach() for source in self._tied.values()}
        return top

    def _read_bottom(self) -> None:
        layers, decoder = emulator.decoder_layers(self._bottom), self._bottom.get_decoder()
        below = set(decoder.modules()) - set(layers.modules())
        self._read({path: m for path, m in self._bottom.named_modules() if m in below}, self.plan.kept)
        for own, layer in enumerate(layers):
            path = f"{self.plan.path}.{own}"
            self._read({f"{path}.{name}": m for name, m in layer.named_modules()}, self.plan.kept)
            if self._dtype == NF4:
                quantise(layer)

    def _read(self, modules: Mapping[str, nn.Module], numbers: Sequence[int]) -> None:
        """Give modules, named in a model of the layers `numbers`, their weights."""
        places: dict[str, list[tuple[nn.Module, str]]] = {}
        for path, module in modules.items():
            for own, weight in module._parameters.items():
                if weight is not None:
                    name = _full(f"{path}.{own}", numbers)
                    places.setdefault(self._tied.get(name, name), []).append((module, own))
        held = {name: self._head[name] for name in places if name in self._head}
        for name, tensor in (*held.items(), *self._files.read(places.keys() - held.keys())):
            here = nn.Parameter(tensor.to(self.device, models.dtype_of(self._dtype)), requires_grad=False)
            for module, own in places[name]:
                if (given := module.get_parameter(own).shape) != here.shape:
                    raise ModelError(
                        f"{name}: the file has {tuple(here.shape)}, the configuration gives {tuple(given)};"
                        " download the folder again"
                    )
                module._parameters[own] = here


def _full(name: str, numbers: Sequence[int]) -> str:
    """A name in a model of the layers `numbers` -> the full model's."""
    parts = split_layer(name)
    return f"{parts[0]}{numbers[parts[1]]}{parts[2]}" if parts else name
