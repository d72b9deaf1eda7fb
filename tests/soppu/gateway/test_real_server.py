"""The real embedded server behind the gateway, and the real clients of OpenAI and LoRAX before it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from soppu.gateway.app import Gateway
from soppu.gateway.keys import KeyStore
from soppu.registry import Registry
from tests.soppu.gateway.house import settings_of
from tests.soppu.registries import freeze
from tests.soppu.serve import tiny
from tests.soppu.serve.test_lorax_client import client

__all__ = ["client"]
pytestmark = pytest.mark.long
PROMPT, USERS = "the quick", ("alice", "bob")


@dataclass(frozen=True)
class Stack:
    url: str
    keys: dict[str, str]
    texts: dict[str, str]  # what PEFT and `generate` give
    registry: Registry


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder, model = tmp_path_factory.mktemp("stack"), tiny.llama()
    adapters = {user: tiny.lora(model, seed=seed) for seed, user in enumerate(USERS, 1)}
    bundle, registry = tiny.bundle(adapters), Registry.open(folder / "registry")
    path = folder / "bundle.safetensors"
    bundle_id = bundle.save(path)
    held = {user: registry.put_adapter(adapter, user=user) for user, adapter in adapters.items()}
    registry.put_bundle(path.read_bytes(), set_id=freeze(registry, held))
    keys = {user: KeyStore(registry.catalogue).create(user)[0] for user in USERS}
    texts = {user: tiny.peft_text(model, PROMPT, bundle.reconstruct(user), tokens=8) for user in USERS}
    with tiny.served(model, folder / "state", bundle=(path, bundle_id)) as server:
        registry.record_publication(target="embedded", url=server, bundle_id=bundle_id)
        with tiny.listening(Gateway.of(registry, settings_of()).app()) as url:
            yield Stack(url, keys, texts, registry)
    registry.close()


def test_the_openai_client_reaches_its_own_model_and_no_other(stack: Stack) -> None:
    for user, other in (USERS, USERS[::-1]):
        asked = openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.keys[user], max_retries=0)
        whole = asked.completions.create(model=user, prompt=PROMPT, max_tokens=8, temperature=0)
        assert whole.choices[0].text == stack.texts[user] and whole.model == user
        stream = asked.completions.create(model="", prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        assert "".join(event.choices[0].text for event in stream) == stack.texts[user]
        with pytest.raises(openai.PermissionDeniedError):
            asked.completions.create(model=other, prompt=PROMPT, max_tokens=8)
        assert [model.id for model in asked.models.list()] == [user]
        with pytest.raises(openai.NotFoundError):
            asked.models.retrieve(other)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0).models.list()


def test_the_lorax_client_reaches_its_own_model_and_no_other(stack: Stack, client: Path) -> None:
    command = [client, Path(__file__).with_name("lorax_calls.py"), stack.url, PROMPT, json.dumps(stack.keys)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for user in USERS:
        told = found[user]
        assert told["unnamed"] == told["named"] == told["stream"] == stack.texts[user]
        assert len(told["refused"]) == 2
