"""What a client keeps between messages: the emulator, the tokenizer, the cached states of its user.

Holds the kept layers and the adapter layers, never the full model. Knows nothing of Flower.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from soppu import models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.data import Example, UserData, load_user, tokenize
from soppu.errors import FederationError
from soppu.federation import emulator
from soppu.federation.emulator import LayerPlan, TopModel
from soppu.federation.train import CachedBlock, cache_states

_KEEP_STATES = 4


@dataclass(frozen=True, eq=False)
class UserStates:
    """One user's examples behind the emulator: to train on and to choose with. Held-out text stays unread."""

    user: UserData
    train: list[CachedBlock]
    validation: list[CachedBlock]


class Workbench:
    """An emulator for one plan, aligned by the LoRA the server sent last."""

    def __init__(self, config: Config, plan: LayerPlan) -> None:
        base = models.resolve(config.base.model, cache=Path(config.base.cache))
        if base.hash != plan.base_hash:
            raise FederationError(
                f"base model {config.base.model!r} here is {base.hash[:12]},"
                f" the plan is for {plan.base_hash[:12]}"
            )
        model = models.load_model(base, dtype=config.frozen_dtype)
        self.plan = plan
        self.config = config
        self.tokenizer = models.load_tokenizer(base)
        self.shapes = emulator.target_shapes(model, plan)
        self.top = TopModel(model, plan)
        self._kept = emulator.with_layers(model, plan.kept)
        self._bottom = self._kept
        self._aligned = ""
        self._states: OrderedDict[str, UserStates] = OrderedDict()

    def align(self, adapter: LoraAdapter) -> None:
        """Take over the server's emulator LoRA; cached states of an older one are dropped."""
        version = adapter.content_hash()
        if version == self._aligned:
            return
        self._bottom = emulator.with_layers(self._kept, range(len(self.plan.kept)))
        own = emulator.to_own(adapter, self.plan, self.plan.kept, who="emulator adapter")
        emulator.merge(self._bottom, own)
        self._states.clear()
        self._aligned = version

    def states(self, user_id: str) -> UserStates:
        """Read, tokenise and run the emulator over one user's text; kept for the last few users."""
        if user_id not in self._states:
            user = load_user(self.config.data, user_id)
            self._states[user_id] = UserStates(user, self._run(user.train), self._run(user.validation))
            while len(self._states) > _KEEP_STATES:
                self._states.popitem(last=False)
        return self._states[user_id]

    def _run(self, examples: tuple[Example, ...]) -> list[CachedBlock]:
        data = self.config.data
        blocks = tokenize(
            examples, self.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template
        )
        return cache_states(self._bottom, blocks, pad_id=self.tokenizer.pad_token_id)


@lru_cache(maxsize=1)
def workbench(config: Config, plan: LayerPlan) -> Workbench:
    """The workbench of this process: Flower makes a new ClientApp for every message."""
    return Workbench(config, plan)
