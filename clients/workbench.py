"""What a client keeps between messages: the emulator, the tokenizer, the cached states of its user.

Holds the kept layers and the adapter layers, never the full model. Knows nothing of Flower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from soppu import models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.data import Example, UserData, load_user, tokenize
from soppu.devices import torch_device
from soppu.errors import FederationError
from soppu.federation import emulator
from soppu.federation.client_part import ClientPart
from soppu.federation.emulator import LayerPlan
from soppu.federation.memory import KEEP_BYTES, KEEP_STATES
from soppu.federation.train import CachedBlock, cache_states, mean_loss


@dataclass(frozen=True, eq=False)
class UserStates:
    """One user's examples behind the emulator: to train on and to choose with. Held-out text stays unread."""

    user: UserData
    train: list[CachedBlock]
    validation: list[CachedBlock]
    losses: dict[str, float] = field(default_factory=dict)  # on validation text, by hash of the adapter

    @property
    def bytes(self) -> int:
        """Of the states."""
        return sum(block.states.nbytes for block in (*self.train, *self.validation))


class Workbench:
    """An emulator for one plan, aligned by the LoRA the server sent last."""

    def __init__(self, config: Config, plan: LayerPlan) -> None:
        base = models.resolve(config.base.model, cache=Path(config.base.cache))
        if base.hash != plan.base_hash:
            raise FederationError(
                f"base model {config.base.model!r} here is {base.hash[:12]},"
                f" the plan is for {plan.base_hash[:12]}"
            )
        self.plan = plan
        self.config = config
        self.tokenizer = models.load_tokenizer(base)
        self._part = ClientPart(
            base,
            plan,
            dtype=config.frozen_dtype,
            compute=models.computing(config.compute_dtype, config.frozen_dtype),
            device=torch_device(config.federation.client_device, key="federation.client_device"),
        )
        self.shapes, self.top = self._part.shapes, self._part.top
        self._aligned, self._lora = "", LoraAdapter({})
        self._states: OrderedDict[str, UserStates] = OrderedDict()

    def align(self, adapter: LoraAdapter) -> None:
        """Take over the server's emulator LoRA; cached states of an older one are dropped."""
        version = adapter.content_hash()
        if version == self._aligned:
            return
        self._lora = emulator.to_own(adapter, self.plan, self.plan.kept, who="emulator adapter")
        self._states.clear()
        self._aligned = version

    def states(self, user_id: str) -> UserStates:
        """Read, tokenise and run the emulator over one user's text; kept for the last users."""
        if user_id not in self._states:
            user = load_user(self.config.data, user_id)
            train, validation = self._run(user.train, user.validation)
            self._states[user_id] = UserStates(user, train, validation)
            while len(self._states) > KEEP_STATES and self._held() > KEEP_BYTES:
                self._states.popitem(last=False)
        return self._states[user_id]

    def _held(self) -> int:
        return sum(states.bytes for states in self._states.values())

    def validation_loss(self, states: UserStates, adapter: LoraAdapter | None) -> float:
        """Mean loss on a user's validation text, nats a token; remembered for as long as the states are."""
        key = adapter.content_hash() if adapter else ""
        if key not in states.losses:
            loss = mean_loss(self.top, self.plan, states.validation, adapter=adapter)
            states.losses[key] = loss
        return states.losses[key]

    def states_of(self, users: Sequence[UserData]) -> list[UserStates]:
        """Of many users, behind one emulator that is read once; not kept."""
        texts = [part for user in users for part in (user.train, user.validation)]
        made = iter(self._run(*texts))
        return [UserStates(user, next(made), next(made)) for user in users]

    def heldout(self, user_id: str) -> list[CachedBlock]:
        """The states of the text a user is judged by; read for that alone, and not kept."""
        (states,) = self._run(load_user(self.config.data, user_id).heldout)
        return states

    def _run(self, *texts: tuple[Example, ...]) -> list[list[CachedBlock]]:
        """Each text's examples behind the aligned emulator."""
        data, pad_id = self.config.data, self.tokenizer.pad_token_id
        parts = [
            tokenize(text, self.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template)
            for text in texts
        ]
        with self._part.bottom(self._lora) as bottom:
            return [cache_states(bottom, blocks, pad_id=pad_id) for blocks in parts]


@lru_cache(maxsize=1)
def workbench(config: Config, plan: LayerPlan) -> Workbench:
    """The workbench of this process: Flower makes a new ClientApp for every message."""
    return Workbench(config, plan)
