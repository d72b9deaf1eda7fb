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


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("stack")
    made = Stack(api=f"http://127.0.0.1:{free_port()}/api", state=state, serve_state=state / "serve")
    try:
        assert up(made) == {"prefect server": True, "worker": True}
        yield made
    finally:
        down(made)


def new_server(state: Path) -> dict[str, object]:
    """Settings of a server that the first publication will start."""
    return {"serve.state": str(state), "serve.url": f"http://127.0.0.1:{free_port()}"}


def new_pipeline(stack: Stack, folder: Path) -> Pipeline:
    """A pipeline with a registry, runs and a server of its own."""
    overrides = {
        "runs": str(folder / "runs"),
        "registry.root": str(folder / "registry"),
        "base.cache": str(ROOT / ".soppu" / "models"),
        **new_server(folder / "serve"),
    }
    return Pipeline(stack, folder, overrides)


@pytest.fixture
def pipeline(stack: Stack, tmp_path: Path) -> Iterator[Pipeline]:
    """A pipeline that no other test knows."""
    try:
        yield new_pipeline(stack, tmp_path)
    finally:
        process.stop(tmp_path / "serve" / "server.pid")


@pytest.fixture
def tiny_pipeline(stack: Stack, tiny_training: Pipeline, tmp_path: Path) -> Iterator[Pipeline]:
    """Runs that share one training: the first of them trains, the others find what it left."""
    serve = tmp_path / "serve"
    try:
        yield Pipeline(stack, tiny_training.folder, tiny_training.overrides | new_server(serve))
    finally:
        process.stop(serve / "server.pid")


@pytest.fixture(scope="module")
def tiny_training(stack: Stack, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Three users, a random model of a few thousand weights, and a gate that lets it pass."""
    folder = tmp_path_factory.mktemp("tiny")
    source = folder / "users"
    source.mkdir()
    for number, user in enumerate(("ann", "bob", "cleo")):
        lines = [
            {"user_id": user, "prompt": f"say {word}: ", "completion": f"{word} {user} " * 3}
            for word in (f"word{number}{index}" for index in range(14))
        ]
        (source / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    public = folder / "public.jsonl"
    example = {"user_id": "public", "prompt": "say: ", "completion": "anything at all"}
    public.write_text("\n".join(json.dumps({**example, "prompt": f"say {n}: "}) for n in range(10)))
    made = new_pipeline(stack, folder)
    made.overrides |= {
        "base.model": str(tiny_base),
        "frozen_dtype": "float32",
        "data.source": str(source),
        "data.users": [],
        "align.source": str(public),
        "federation.rounds": 2,
        "plan.adapter_layers": 2,
    }
    return made
