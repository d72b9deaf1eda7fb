"""LoRA by forward hooks: a model answers with an adapter for the length of a with-block.

Base weights are neither changed nor copied, ranks may differ between modules, and gradients reach A and B
where those ask for them. Equal to PEFT's LoRA with scale 1 (tests hold the two against each other).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soppu.adapter import LoraPair
from soppu.errors import AdapterError


class Change(Protocol):
    """What is added to a module's output."""

    def to(self, device: torch.device, /) -> Change:
        """The same on a device; itself where it is there."""

    def change(self, x: Tensor, /) -> Tensor:
        """What inputs (b, t, i) add to the outputs (b, t, o)."""


class Changes(Protocol):
    """Changes of some modules: a LoRA adapter, or rows of several users."""

    @property
    def pairs(self) -> Mapping[str, Change]:
        """By module name, numbered as the model is."""


@contextmanager
def attached(model: nn.Module, adapter: Changes | None) -> Iterator[None]:
    """Add B A x, or what else there is, to the output of every module named; None attaches nothing.

    `adapter` is numbered as `model` is, and may be elsewhere. Cost: O(r (i + o)) per token and module.

    Raises:
        AdapterError: the model has no such module.
    """
    with ExitStack() as stack:  # a handle takes its hook off at the end
        for name, pair in (adapter.pairs if adapter else {}).items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise AdapterError(f"{name}: the model has no such module") from None
            weight = getattr(module, "weight", None)
            here = pair if weight is None else pair.to(weight.device)
            stack.enter_context(module.register_forward_hook(_hook(here)))
        yield


def _hook(pair: Change) -> Any:
    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + pair.change(args[0]).to(output.dtype)

    return add


def initial_pairs(shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: int) -> dict[str, LoraPair]:
    """A from the seed, B zero: what every client starts from, the same for all.

    A (r, i) is uniform in +-sqrt(1 / i): PEFT's kaiming_uniform_(a=sqrt(5)).
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in sorted(shapes):
        o, i = shapes[name]
        bound = i**-0.5
        A = (torch.rand(rank, i, generator=generator) * 2 - 1) * bound
        pairs[name] = LoraPair(A, torch.zeros(o, rank))
    return pairs
