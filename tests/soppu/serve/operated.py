"""A server with three users and an adapter, what is asked of it, and its figures as Prometheus reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

PROMPT = "the quick"
USERS = ("alice", "bob", "žofie")
ADMIN = {"authorization": f"Bearer {tiny.TOKEN}"}


class Server:
    """A server with three users and a PEFT adapter; a client that shows what the server fails at as a 500."""

    def __init__(self, folder: Path) -> None:
        model = tiny.llama()
        self.bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
        self.state = ServerState.open(folder / "state", self.bank)
        self.engine = Engine(model, tiny.tokenizer(), self.bank, EngineOptions())
        shared = tiny.bundle({user: tiny.lora(model, seed=seed) for seed, user in enumerate(USERS, 1)})
        self.bundle_id = shared.save(folder / "bundle")
        self.state.add_bundle(folder / "bundle", bundle_id=self.bundle_id)
        self.state.activate(self.bundle_id)
        info = ServerInfo("tiny", tiny.BASE_HASH, admin_token=tiny.TOKEN)
        self.app = create_app(self.engine, info=info, state=self.state)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def generate(self, path: str = "/generate", *, inputs: Any = PROMPT, **parameters: Any) -> Any:
        body = {"inputs": inputs, "parameters": {"max_new_tokens": 3, **parameters}}
        return self.client.post(path, json=body)

    def figures(self) -> dict[tuple[str, ...], float]:
        """Name and label values -> value, as Prometheus reads them."""
        text = self.client.get("/metrics").text
        return {
            (_as_written(sample.name), *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def _as_written(name: str) -> str:
    """The parser gives every counter the ending that LoRAX's do not have."""
    return name.removesuffix("_total") if name.startswith("lorax_") else name


@contextlib.contextmanager
def operated(folder: Path) -> Iterator[Server]:
    """A server that is up until the end of the block."""
    server = Server(folder)
    with server.client:
        yield server
    server.state.close()
