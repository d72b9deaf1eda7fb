"""A server that is started again on one state folder, and the bundles and adapters that are put to it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

PROMPT = "the quick"


@dataclass
class Server:
    client: TestClient
    model: PreTrainedModel
    engine: Engine
    bank: AdapterBank
    state: ServerState

    def post(self, path: str = "/generate", *, stream: bool | None = None, **parameters: Any) -> Any:
        body: dict[str, Any] = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6, **parameters}}
        return self.client.post(path, json=body if stream is None else {**body, "stream": stream})


Start = Callable[..., Server]


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Start]:
    """Starts servers on one state folder; stops the one before, as a restart would."""
    torch.set_num_threads(1)
    running: list[Server] = []

    def stop() -> None:
        while running:
            server = running.pop()
            server.client.__exit__(None, None, None)
            server.state.close()

    def build(*, token: str = tiny.TOKEN, base_hash: str = tiny.BASE_HASH, **options: int) -> Server:
        stop()
        model = tiny.llama()
        bank = AdapterBank(model, base_hash=base_hash)
        state = ServerState.open(folder, bank)
        engine = Engine(model, tiny.tokenizer(), bank, EngineOptions(**options))
        app = create_app(engine, info=ServerInfo("tiny", base_hash, admin_token=token), state=state)
        headers = {"authorization": f"Bearer {tiny.TOKEN}"}
        server = Server(TestClient(app, headers=headers).__enter__(), model, engine, bank, state)
        running.append(server)
        return server

    try:
        yield build
    finally:
        stop()


def three_adapters() -> dict[str, LoraAdapter]:
    return {
        name: tiny.lora(tiny.llama(), seed=seed) for seed, name in enumerate(("alice", "bob", "žofie"), 1)
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starting(tmp_path / "state") as start:
        yield start


@pytest.fixture(scope="module")
def members() -> dict[str, LoraAdapter]:
    return three_adapters()


def put(server: Server, bundle: Bundle, *, activate: bool = True) -> str:
    data = bundle.to_bytes()
    bundle_id = sha256(data)
    assert server.client.put(f"/soppu/v1/bundles/{bundle_id}", content=data).status_code in (200, 201)
    if activate:
        assert server.client.post(f"/soppu/v1/bundles/{bundle_id}/activate").status_code == 200
    return bundle_id


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar(
    adapter: LoraAdapter, *, extra: dict[str, bytes] | None = None, drop: str = "", prefix: str = "./"
) -> bytes:
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as out:
        adapters.write(adapter, Path(folder))
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path in sorted(Path(folder).iterdir()):
                if path.name != drop:
                    archive.add(path, arcname=prefix + path.name)
            for name, data in (extra or {}).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return out.getvalue()
