"""A base model made ready for one LoRA on its last layers, and users' text as what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import gather_object

from soppu.adapter import LoraAdapter
from soppu.central.pooled import Decoder, Pooled, Sample, WholeModel
from soppu.central.training import Pairs
from soppu.data import Block
from soppu.errors import UnsupportedModel
from soppu.federation import emulator
from soppu.federation.attach import initial_pairs
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import cache_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_BELOW = 2  # layers that a cut leaves below


@dataclass(frozen=True)
class Place:
    """Where the LoRA sits: on the last `layers` of the decoder, `rank` wide.

    Attributes:
        cached: the layers below run once for each example, and only those with the LoRA in every step.
    """

    layers: int
    rank: int
    target_modules: tuple[str, ...] = ()
    cached: bool = True


class Bench:
    """The model under training on one process.

    Args:
        model: the full model, frozen; whole, it is changed: LoRA modules take the place of what is adapted.
        base_hash: of the base model's files.
        seed: of the LoRA's start.

    Raises:
        UnsupportedModel: the decoder has not so many layers, or not such modules.
    """

    def __init__(self, model: PreTrainedModel, base_hash: str, place: Place, *, seed: int) -> None:
        total = len(emulator.decoder_layers(model))
        if not 1 <= place.layers <= total:
            raise UnsupportedModel(f"layers = {place.layers}, allowed: 1 to {total}, as the decoder has")
        if place.cached and place.layers > total - LEAST_BELOW:
            raise UnsupportedModel(
                f"layers = {place.layers}: at most {total - LEAST_BELOW} can be cached below"
            )
        self.cached = place.cached
        self.plan: LayerPlan = emulator.make_plan(
            model,
            base_hash=base_hash,
            adapter_layers=min(place.layers, total - LEAST_BELOW),
            drop_ratio=0.0,
            target_modules=place.target_modules,
        )
        numbers = range(total - place.layers, total)
        shapes = emulator.target_shapes(model, self.plan, numbers)
        start = LoraAdapter(
            initial_pairs(shapes, rank=place.rank, seed=seed),
            base_hash=base_hash,
            fan_in_fan_out=self.plan.fan_in_fan_out,
        )
        decoder: Decoder = WholeModel(model)
        if self.cached:
            self._bottom = emulator.with_layers(model, self.plan.bottom)
            decoder = TopModel(model, self.plan)
            start = emulator.to_own(start, self.plan, self.plan.adapter)
        self._start = start
        self.pooled = Pooled(decoder, start.pairs, fan_in_fan_out=self.plan.fan_in_fan_out)

    def samples(self, blocks: Sequence[Block], *, pad_id: int, accelerator: Accelerator) -> list[Sample]:
        """What the model reads of token blocks: the same on every process, each of which runs its share.

        Cost: where the layers below are cached, one forward pass of them; (t, d) numbers are kept a block.
        """
        if not self.cached:
            return [(block.ids, block.labels) for block in blocks]
        bottom = self._bottom.to(accelerator.device)
        own = cache_states(
            bottom, blocks[accelerator.process_index :: accelerator.num_processes], pad_id=pad_id
        )
        shares = gather_object([[(sample.states.cpu(), sample.labels) for sample in own]])
        count = accelerator.num_processes
        return [shares[index % count][index // count] for index in range(len(blocks))]

    def adapter(self, pairs: Pairs, *, base_model: str) -> LoraAdapter:
        """Factors of the training as an adapter of the full model."""
        found = LoraAdapter(pairs, base_model, self._start.base_hash, self._start.fan_in_fan_out)
        return emulator.to_full(found, self.plan, self.plan.adapter) if self.cached else found
