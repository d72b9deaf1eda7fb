"""A real Prefect server and a real worker on ports of their own, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.stack import ROOT, Stack, down, up
from soppu.federation.simulation import free_port
from soppu.targets import process
from tests.flows.driver import Pipeline


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("stack")
    made = Stack(api=f"http://127.0.0.1:{free_port()}/api", state=state, serve_state=state / "serve")
    try:
        up(made)
        yield made
    finally:
        down(made)


@pytest.fixture
def pipeline(stack: Stack, tmp_path: Path) -> Iterator[Pipeline]:
    """A pipeline with a registry, runs and a server of its own."""
    serve = tmp_path / "serve"
    overrides = {
        "runs": str(tmp_path / "runs"),
        "registry.root": str(tmp_path / "registry"),
        "base.cache": str(ROOT / ".soppu" / "models"),
        "serve.state": str(serve),
        "serve.url": f"http://127.0.0.1:{free_port()}",
    }
    try:
        yield Pipeline(stack, tmp_path, overrides)
    finally:
        process.stop(serve / "server.pid")


@pytest.fixture
def tiny_overrides(tiny_base: Path, tmp_path: Path) -> dict[str, object]:
    """Three users, a random model of a few thousand weights, and a gate that lets it pass."""
    source = tmp_path / "users"
    source.mkdir()
    for number, user in enumerate(("ann", "bob", "cleo")):
        lines = [
            {"user_id": user, "prompt": f"say {word}: ", "completion": f"{word} {user} " * 3}
            for word in (f"word{number}{index}" for index in range(14))
        ]
        (source / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    public = tmp_path / "public.jsonl"
    example = {"user_id": "public", "prompt": "say: ", "completion": "anything at all"}
    public.write_text("\n".join(json.dumps({**example, "prompt": f"say {n}: "}) for n in range(10)))
    return {
        "base.model": str(tiny_base),
        "frozen_dtype": "float32",
        "data.source": str(source),
        "data.users": [],
        "align.source": str(public),
        "federation.rounds": 2,
        "plan.adapter_layers": 2,
    }
