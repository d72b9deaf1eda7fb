"""A server whose tokenizer has a chat template, and which can be made to say a given text."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from soppu.compress.bundle.bundle import Bundle
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'bishop' %}{{ raise_exception('no bishops') }}{% endif %}"
    "{{ message['role'] }}{% if message['name'] %}({{ message['name'] }}){% endif %}:"
    "{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BUNDLE_ID = "c0ffee" + "0" * 58


@dataclass(frozen=True)
class Talker:
    """One server, not yet listening."""

    app: Starlette
    engine: Engine
    bank: AdapterBank
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @contextlib.contextmanager
    def says(self, text: str, *, then: Sequence[int] = ()) -> Iterator[list[int]]:
        """The next request's tokens are those of `text`, then these ids, then the end; yields the ids."""
        ids = [*self.tokenizer(text)["input_ids"], *then, self.tokenizer.eos_token_id]
        left = iter(ids)

        def instead(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
            chosen = torch.full_like(logits, -50.0)
            chosen[..., next(left, self.tokenizer.eos_token_id)] = 0.0
            return chosen

        with contextlib.closing(_Removable(self.model.lm_head.register_forward_hook(instead))):
            yield ids


@dataclass(frozen=True)
class _Removable:
    handle: Any

    def close(self) -> None:
        self.handle.remove()


def members() -> Bundle:
    return tiny.bundle({name: tiny.lora(tiny.llama(), seed=i) for i, name in enumerate(("alice", "bob"), 1)})


@contextlib.contextmanager
def talker(
    folder: Path, *, template: str | None = TEMPLATE, tokenizer: Any = None, **options: int
) -> Iterator[Talker]:
    """A server of the tiny llama that serves alice and bob from a bundle."""
    torch.set_num_threads(1)
    tokenizer = copy.deepcopy(tokenizer or tiny.tokenizer())
    tokenizer.chat_template = template
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    state = ServerState.open(folder, bank)
    bank.commit = None
    bank.stage(members(), bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    engine = Engine(model, tokenizer, bank, EngineOptions(**options))
    app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH), state=state)
    try:
        yield Talker(app, engine, bank, model, tokenizer)
    finally:
        state.close()
