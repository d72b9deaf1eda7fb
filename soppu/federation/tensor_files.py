"""Some of a model's weights, out of its files, without the others. Loads transformers' loading code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from soppu import models
from soppu.errors import ModelError
from soppu.models import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty(base: BaseModel) -> PreTrainedModel:
    """The model with its buffers but without its weights, which `TensorFiles` reads. Raises ModelError."""
    with models.reading(base, "configuration"), init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(base.path, local_files_only=True)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


class TensorFiles:
    """Where a model's tensors lie, to read some of them and no other.

    Names are the model's own: what transformers renames while it loads is renamed here by its own rules.

    Args:
        model: what `empty` gives.

    Raises:
        ModelError: a file cannot be read.
    """

    def __init__(self, base: BaseModel, model: PreTrainedModel) -> None:
        self._base = base
        self._places: dict[str, tuple[Path, str]] = {}  # name -> file, name in the file
        known = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)}
        rules: Any = get_model_conversion_mapping(model)
        for path in sorted(base.path.glob("*.safetensors")):
            with models.reading(base, "weights"), safe_open(path, framework="pt") as file:
                for stored in file.keys():
                    name, _ = rename_source_key(stored, rules, [], model.base_model_prefix, known)
                    self._places[name] = (path, stored)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, file by file, in the file's dtype. ModelError for one that is not there.

        They are views of the file: pages that are not computed with take no memory.
        """
        wanted: dict[Path, list[tuple[str, str]]] = {}
        for name in sorted(names):
            if name not in self._places:
                raise ModelError(
                    f"base model {self._base.name!r}: no tensor {name} in the *.safetensors of"
                    f" {self._base.path}; if the folder is not whole, download it again"
                )
            path, stored = self._places[name]
            wanted.setdefault(path, []).append((name, stored))
        for path, pairs in wanted.items():
            with safe_open(path, framework="pt") as file:
                for name, stored in pairs:
                    yield name, file.get_tensor(stored)
