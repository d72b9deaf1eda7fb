"""Ways to train for users, behind one face: LoRAs and cores by the project's loop, others by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.personal_users import Words
from soppu.adapter import LoraAdapter
from soppu.cores.core import CoreInBasis
from soppu.federation import emulator, wire
from soppu.federation.attach import attached
from soppu.federation.train import CachedBlock, Together, TrainOptions, backward, batches, mean_loss

Blocks = Sequence[CachedBlock]
BATCH, B_RATIO = 4, 2.0
_AT_ONCE = 8  # users in one pass


class Way(Protocol):
    """How users get something of their own. What that is, only the way itself knows."""

    def run(self, texts: Sequence[Blocks], *, rate: float, marks: Sequence[int]) -> Iterator[list[Any]]:
        """What every user has after each of these numbers of steps, ascending."""

    def loss(self, held: Any, blocks: Blocks) -> float:
        """Mean loss of a text with what a user has, nats a token: what steps are chosen by."""

    def judged(self, held: Any, blocks: Blocks) -> float:
        """The same in float32: what is reported."""

    def sent(self, held: Any) -> dict[str, Tensor]:
        """The numbers that are a user's own."""


class Model:
    """The layers that are trained on, of the base model or with an adapter that stays beside it.

    Args:
        words: what the head that is trained through knows; every loss that is looked at is over all tokens.
        dtype: what it is trained in; `judged` is always in float32.
        beside: an adapter that everybody has.
    """

    def __init__(
        self,
        whole: Any,
        plan: emulator.LayerPlan,
        *,
        words: Words,
        dtype: torch.dtype,
        beside: LoraAdapter | None = None,
    ) -> None:
        self.plan = plan
        self.seen = emulator.TopModel(whole, plan, dtype=dtype)
        self.top = words.cut(self.seen)
        self.exact = self.seen if dtype == torch.float32 else emulator.TopModel(whole, plan)
        self._hooks = ExitStack()  # for as long as the model is there
        if beside is not None:
            own = emulator.to_own(beside, plan, plan.adapter)
            for top in {id(top): top for top in (self.seen, self.exact)}.values():
                self._hooks.enter_context(attached(top.model, own))

    def loss(self, blocks: Blocks, adapter: LoraAdapter | None) -> float:
        """Mean loss of a text as it is trained, nats a token."""
        return mean_loss(self.seen, self.plan, blocks, adapter=adapter, batch_size=16)

    def judged(self, blocks: Blocks, adapter: LoraAdapter | None) -> float:
        """The same in float32."""
        return mean_loss(self.exact, self.plan, blocks, adapter=adapter, batch_size=16)


@dataclass(frozen=True, eq=False)
class InLoop:
    """A LoRA or a core, from one start for everybody, by `Together`."""

    model: Model
    start: LoraAdapter | CoreInBasis
    own: Callable[[Any], dict[str, Tensor]]
    held: tuple[int, int] = (0, 0)  # first rows of A and columns of B that stay
    batch: int = BATCH
    seed: int = 0

    def run(self, texts: Sequence[Blocks], *, rate: float, marks: Sequence[int]) -> Iterator[list[Any]]:
        """See `Way`. Cost: one forward and backward pass a step and user, `_AT_ONCE` of them together."""
        options = TrainOptions(
            batch_size=self.batch, learning_rate=rate, b_ratio=B_RATIO, seed=self.seed, held=self.held
        )
        groups = [texts[first : first + _AT_ONCE] for first in range(0, len(texts), _AT_ONCE)]
        made: list[Together[Any]] = [
            Together(self.model.top, self.model.plan, own, starts=[self.start] * len(own), options=options)
            for own in groups
        ]
        done = 0
        for mark in marks:
            for training in made:
                training.advance(mark - done)
            done = mark
            yield [one.adapter(n) for one, own in zip(made, groups, strict=True) for n in range(len(own))]

    def loss(self, held: LoraAdapter | CoreInBasis, blocks: Blocks) -> float:
        """See `Way`."""
        return self.model.loss(blocks, _lora(held))

    def judged(self, held: LoraAdapter | CoreInBasis, blocks: Blocks) -> float:
        """See `Way`."""
        return self.model.judged(blocks, _lora(held))

    def sent(self, held: LoraAdapter | CoreInBasis) -> dict[str, Tensor]:
        """See `Way`."""
        return self.own(held)


def _lora(held: LoraAdapter | CoreInBasis) -> LoraAdapter:
    return held.to_lora() if isinstance(held, CoreInBasis) else held


def whole(held: LoraAdapter) -> dict[str, Tensor]:
    """Both factors of a LoRA."""
    return wire.to_state(held)


def only_b(held: LoraAdapter) -> dict[str, Tensor]:
    """B alone: A came from the server and is as it was."""
    return {name: tensor for name, tensor in wire.to_state(held).items() if ".lora_B." in name}


def of_core(held: CoreInBasis) -> dict[str, Tensor]:
    """A core, and what it has of its own beside."""
    return held.core.tensors()


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes as a safetensors file, which is what is sent."""
    return len(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many there are."""
    return sum(tensor.numel() for tensor in tensors.values())


class InPeft:
    """A method of PEFT on the trained layers, one user after the other, every user from its first numbers.

    Args:
        model: changed by PEFT, so it is for this alone.
        config: gives PEFT's configuration of the method.
    """

    def __init__(self, model: Model, config: Any, *, seed: int) -> None:
        from peft import get_peft_model

        torch.manual_seed(seed)  # PEFT draws from torch's own randomness
        self._model, self._seed = model, seed
        self._peft: Any = get_peft_model(model.top.model, config)
        named = self._peft.named_parameters()
        self._trained: dict[str, Tensor] = {name: one for name, one in named if one.requires_grad}
        self._start = {name: one.detach().clone() for name, one in self._trained.items()}

    def run(self, texts: Sequence[Blocks], *, rate: float, marks: Sequence[int]) -> Iterator[list[Any]]:
        """See `Way`. All users are trained to the end before the first mark is given."""
        made = [list(self._one(text, rate, marks)) for text in texts]
        yield from (list(column) for column in zip(*made, strict=True))

    def _one(self, text: Blocks, rate: float, marks: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        self._put(self._start)
        optimizer = torch.optim.AdamW(list(self._trained.values()), lr=rate, weight_decay=0.0)
        options = TrainOptions(batch_size=BATCH, seed=self._seed)
        for step, chosen in enumerate(batches(len(text), options), start=1):
            optimizer.zero_grad(set_to_none=True)
            backward(self._model.top, [text[index] for index in chosen])
            optimizer.step()
            if step in marks:
                yield {name: one.detach().clone() for name, one in self._trained.items()}
            if step == marks[-1]:
                return

    @torch.no_grad()
    def _put(self, numbers: Mapping[str, Tensor]) -> None:
        for name, tensor in numbers.items():
            self._trained[name].copy_(tensor)

    def loss(self, held: Mapping[str, Tensor], blocks: Blocks) -> float:
        """See `Way`."""
        self._put(held)
        return self._model.loss(blocks, None)

    judged = loss  # PEFT's numbers sit in the layers that they were trained in, which compute in float32

    def sent(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Way`."""
        return dict(held)
