"""The real OpenAI client of a server that can be made to say a given text, and what it asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve import tiny
from tests.soppu.serve.talking import Talker, members, talker

PROMPT = "the quick"
SAID: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]
RENDERED = "system:be brief\nuser:the fox\nassistant:"


@dataclass(frozen=True)
class Served:
    client: OpenAI
    url: str
    talker: Talker

    def tokens(self, text: str) -> int:
        return len(self.talker.tokenizer(text)["input_ids"])


@contextlib.contextmanager
def asking(folder: Path) -> Iterator[Served]:
    with talker(folder, max_batch=8) as server, tiny.listening(server.app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield Served(client, url, server)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with asking(tmp_path_factory.mktemp("openai") / "state") as served:
        yield served


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return members()


def text_of(shared: Bundle, who: str, prompt: str) -> str:
    """What PEFT and generate give."""
    return tiny.peft_text(tiny.llama(), prompt, shared.reconstruct(who) if who else None, tokens=6)
