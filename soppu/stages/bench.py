"""Where held-out losses are measured: the full model, and the text of the users that is at hand.

The gate and the comparison of arms both measure here, so that their losses are the same numbers.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice

import torch

from soppu import models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.data import Example, UserData, list_users, load_user, tokenize
from soppu.data.tokens import Block
from soppu.devices import torch_device
from soppu.errors import DataError
from soppu.evaluate.losses import COLUMNS, ExampleLosses, UserLosses, example_losses
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.train import CachedBlock, cache_states
from soppu.module_names import split_layer
from soppu.stages.run import Run

_log = logging.getLogger(__name__)


class Bench:
    """The full model, split where the lowest adapted layer begins.

    Args:
        keep: whether the states of every text stay in memory: of one user, who is measured again and again.
    """

    def __init__(self, run: Run, *, layers: int, keep: bool = False) -> None:
        base = run.base()
        self._kept: dict[Example, list[CachedBlock]] | None = {} if keep else None
        self.config = run.config
        device = torch_device(run.config.gate.device, key="gate.device")
        self.model = models.load_model(base, dtype=run.config.frozen_dtype, device=device)
        self.tokenizer = models.load_tokenizer(base)
        total = len(emulator.decoder_layers(self.model))
        self.plan = emulator.make_plan(
            self.model,
            base_hash=base.hash,
            adapter_layers=total - layers,
            drop_ratio=0.0,
            target_modules=run.config.lora.target_modules,
        )
        self.top = emulator.TopModel(self.model, self.plan)
        self.bottom = emulator.with_layers(self.model, self.plan.bottom)

    @cached_property
    def trains(self) -> emulator.TopModel:
        """What users are trained on, in the run's `compute_dtype`; losses of the record are float32's."""
        dtype = models.computing(self.config.compute_dtype, self.config.frozen_dtype)
        return self.top if dtype == torch.float32 else emulator.TopModel(self.model, self.plan, dtype=dtype)

    def losses(self, text: UserData, tried: Mapping[str, LoraAdapter | None], *, served: str) -> UserLosses:
        """Losses with the base model and with what is tried, by column; None there is the base model."""
        columns = [name for name in COLUMNS if name != "shared" or tried[name]]
        each = self.measure(text.heldout, {name: tried.get(name) for name in columns})
        again = {name: tried[name] for name in ("shared", "compressed")}
        # where there is little text what was trained on doubles as validation text: nothing is learnt from it
        apart = text.validation and text.validation != text.train and all(again.values())
        # no more of it than is held out: it says only which of two is better
        by = self.measure(text.validation[: len(text.heldout)], again) if apart else None
        return UserLosses(
            text.user_id,
            len(text.heldout),
            base=each.mean("base"),
            personal=each.mean("personal"),
            compressed=each.mean("compressed"),
            shared=each.mean("shared") if tried["shared"] else None,
            served=served,
            validation_shared=by.mean("shared") if by else None,
            validation_compressed=by.mean("compressed") if by else None,
            each=each,
        )

    def measure(self, examples: Sequence[Example], tried: Mapping[str, LoraAdapter | None]) -> ExampleLosses:
        """Every example with each of the adapters, None being the base model.

        The layers below the cut run once, and once more for each adapter that reaches below it.
        """
        states = self.states(examples)
        found = {}
        for name, adapter in tried.items():
            above, below = self._cut(adapter)
            at = self._below(self._blocks(examples), below) if below else states
            found[name] = example_losses(self.top, self.plan, at, adapter=above)
        tokens = tuple(count for _, count in next(iter(found.values())))
        return ExampleLosses(
            tokens, {name: tuple(loss for loss, _ in pairs) for name, pairs in found.items()}
        )

    def states(self, examples: Sequence[Example]) -> list[CachedBlock]:
        """What the layers below the cut make of some text: what can be trained on, again and again."""
        if self._kept is None:
            return self._below(self._blocks(examples), None)
        new = {one: self._blocks([one]) for one in dict.fromkeys(examples) if one not in self._kept}
        made = iter(self._below([block for blocks in new.values() for block in blocks], None))
        self._kept |= {one: list(islice(made, len(blocks))) for one, blocks in new.items()}
        return [block for one in examples for block in self._kept[one]]

    def _blocks(self, examples: Sequence[Example]) -> list[Block]:
        data = self.config.data
        return tokenize(
            examples, self.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template
        )

    def _below(self, blocks: Sequence[Block], adapter: LoraAdapter | None) -> list[CachedBlock]:
        """What the layers below the cut make of the blocks."""
        with attached(self.bottom, adapter):
            return cache_states(self.bottom, blocks, pad_id=self.tokenizer.pad_token_id)

    def _cut(self, adapter: LoraAdapter | None) -> tuple[LoraAdapter | None, LoraAdapter | None]:
        """The parts of an adapter above the cut and below it; None where there is nothing."""
        if adapter is None:
            return None, None
        inside = set(self.plan.adapter)
        above = {
            name: pair
            for name, pair in adapter.pairs.items()
            if (place := split_layer(name)) and place[1] in inside
        }
        below = {name: pair for name, pair in adapter.pairs.items() if name not in above}
        replace = dataclasses.replace
        return replace(adapter, pairs=above) if above else None, replace(
            adapter, pairs=below
        ) if below else None


def with_text(config: Config, members: Iterable[str]) -> dict[str, UserData]:
    """Text of the members who have enough of it here; of the others the log says why."""
    found = {}
    data = dataclasses.replace(config.data, on_small_user="leave-out")  # one user's fault is not the others'
    for user in sorted(set(data.users or list_users(data)).intersection(members)):
        try:
            found[user] = load_user(data, user)
        except DataError as error:
            _log.warning("not measured: %s", error)
    return found
