"""Reference: what the base model and an adapter give on this machine, to hold a server's answer against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from soppu import adapter, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError
from soppu.targets.canary import Trace


class Reference:
    """One base model in float32 on the CPU."""

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.shapes = models.linear_shapes(model)

    @classmethod
    def load(cls, name: str, *, cache: Path) -> Reference:
        """Of a base model as `models.resolve` takes it. Raises ModelError."""
        base = models.resolve(name, cache=cache)
        return cls(models.load_model(base), models.load_tokenizer(base))

    def fault(self, prompt: str, trace: Trace, own: LoraAdapter | None, *, tolerance: float) -> str:
        """What is wrong with a greedy answer of the base model, or of it with an adapter; "" if nothing.

        The server's own tokens are read in one pass: each has to be the likeliest one here, and to have the
        logprob that was told, both within `tolerance`. So rounding that tips a tie is no fault, and what
        comes after it is checked as well.

        Raises:
            AdapterError: the adapter does not fit the base model.
        """
        tokens = [token for token, _ in trace]
        begin = self._tokenizer(prompt)["input_ids"]
        if not tokens:
            return "no tokens came back"
        with torch.no_grad(), self._with(own):
            logits = self._model(input_ids=torch.tensor([begin + tokens[:-1]])).logits
        logprobs = torch.log_softmax(logits[0, len(begin) - 1 :].float(), -1)
        for place, ((token, told), here) in enumerate(zip(trace, logprobs, strict=True), start=1):
            if not 0 <= token < len(here):
                return f"token {place} is {token}, the model has {len(here)}"
            best, mine = int(here.argmax()), float(here[token])
            if not float(here[best]) - mine <= tolerance:
                return f"token {place} is {token}, here it is {best}: {float(here[best]) - mine:.3g} likelier"
            if not abs(mine - told) <= tolerance:
                return f"token {place} has logprob {told:.3g}, here {mine:.3g}"
        return ""

    @contextmanager
    def _with(self, own: LoraAdapter | None) -> Iterator[None]:
        """The model with an adapter's products added to what its layers give."""
        if own is not None:
            adapter.check_shapes(own, self.shapes, who="the adapter")
        hooks = [
            self._model.get_submodule(name).register_forward_hook(_adding(pair))
            for name, pair in (own.pairs if own is not None else {}).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def read(folder: Path) -> LoraAdapter:
    """The adapter of a folder as LoRAX reads it: of all its safetensors files. AdapterError if it is none."""
    parts = sorted(folder.glob("*.safetensors"))
    if len(parts) < 2:
        return adapter.read(folder)
    halves: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        with safe_open(part, framework="pt") as stream:
            for key in stream.keys():
                module, _, side = key.removesuffix(".weight").rpartition(".lora_")
                halves.setdefault(module.removeprefix("base_model.model."), {})[side] = stream.get_tensor(key)
    if torn := [name for name, half in halves.items() if set(half) != {"A", "B"}]:
        raise AdapterError(f"{folder}: {torn[0]}: not a pair of lora_A and lora_B")
    return LoraAdapter({name: LoraPair(half["A"], half["B"]) for name, half in halves.items()})


def has_effect(own: LoraAdapter) -> bool:
    """Whether an adapter changes anything at all."""
    return any(bool(pair.A.any() and pair.B.any()) for pair in own.pairs.values())


def _adding(pair: LoraPair) -> Any:
    A, B = pair.A.float(), pair.B.float()

    def hook(_: object, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + given[0] @ A.mT @ B.mT

    return hook
