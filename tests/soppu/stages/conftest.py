"""A run with adapters in the registry, as if a federation had just ended. No Flower, no Prefect."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.data import load_user, tokenize
from soppu.federation import emulator
from soppu.federation.attach import initial_pairs
from soppu.federation.personalise import PERSONAL
from soppu.federation.simulation import free_port
from soppu.federation.train import TrainOptions, cache_states, fit
from soppu.stages.federate import RESULT
from soppu.stages.run import FEDERATION, Run, open_run, prepare
from soppu.targets import process

USERS = ("ann", "bob", "cleo")


@pytest.fixture
def config_path(tiny_base: Path, tmp_path: Path) -> Path:
    return three_users(tmp_path, tiny_base)


def three_users(tmp_path: Path, tiny_base: Path) -> Path:
    """A configuration file for three users with a few lines each and the tiny model."""
    source = tmp_path / "users"
    source.mkdir()
    for user in USERS:
        lines = [
            {"user_id": user, "prompt": f"say {n}: ", "completion": f"{user} says {n} " * 3}
            for n in range(14)
        ]
        (source / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "base": {"model": str(tiny_base)},
        "data": {"source": str(source), "heldout_examples": 4, "max_tokens": 48},
        "plan": {"adapter_layers": 2},
        "compress": {"method": "joint", "ratio": 0.0, "rank": 8, "basis_bits": 32, "core_bits": 32},
        "serve": {
            "url": f"http://127.0.0.1:{free_port()}",
            "state": str(tmp_path / "serve"),
            "canary_tokens": 2,
            "completion_tokens": 4,
        },
        "registry": {"root": str(tmp_path / "registry")},
    }
    lines = [f'runs = "{tmp_path / "runs"}"']
    for table, entries in values.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    path = tmp_path / "three.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def overrides() -> dict[str, object]:
    """What a test's run has otherwise than the file."""
    return {}


@pytest.fixture
def run(config_path: Path, overrides: dict[str, object]) -> Iterator[Run]:
    opened = open_run(prepare(str(config_path), overrides))
    yield opened
    if "serve.state" not in overrides:  # else whoever gave it stops what was started there
        for name in ("server.pid", "vllm.pid"):
            process.stop(Path(opened.config.serve.state) / name)


def a_plan(run: Run) -> emulator.LayerPlan:
    base = run.base()
    return emulator.make_plan(models.load_model(base), base_hash=base.hash, adapter_layers=2, drop_ratio=0.0)


def write_result(run: Run, own: dict[str, str], *, shared: LoraAdapter | None = None, **served: str) -> None:
    """What a federation leaves behind: everybody's own adapter, the shared one, and what whom serves best."""
    shared = shared or run.registry().get_adapter(next(iter(own.values())))
    adapters.write(shared, run.folder / FEDERATION / "shared")
    plan = a_plan(run)
    told = {"kept": list(plan.kept), "adapter_layers": list(plan.adapter), "hash": plan.hash}
    run.write(
        RESULT,
        {
            "adapters": own,
            "shared": "shared",
            "served": {**dict.fromkeys(own, PERSONAL), **served},
            "plan": {**told, "json": plan.to_json()},
            "align": {name: {"l2": 0.1, "kl": 0.2} for name in ("before", "after")},
            "rounds": [],
            "refused": {},
        },
    )


def without_effect(run: Run, bundle_id: str) -> str:
    """The id of a bundle as this one, but that bob has an adapter which does nothing."""
    registry = run.registry()
    bundle = Bundle.load(registry.bundle_path(bundle_id))
    bundle.norm[1] = 1e-30
    return registry.put_bundle(bundle.to_bytes(), set_id=registry.bundle(bundle_id).set_id)


@pytest.fixture(scope="session")
def cached() -> dict[tuple[str, str], LoraAdapter]:
    """Adapters trained so far, by base model and user: every test's users have the same text."""
    return {}


@pytest.fixture
def trained(run: Run, cached: dict[tuple[str, str], LoraAdapter]) -> dict[str, str]:
    """Every user's adapter, trained on the full model and stored; user -> adapter id."""
    base = run.base().hash
    for user in USERS:
        if (base, user) not in cached:
            cached[base, user] = train(run, user)
    registry = run.registry()
    return {user: registry.put_adapter(cached[base, user], user=user, run=run.id) for user in USERS}


def train(run: Run, user: str, *, steps: int = 12) -> LoraAdapter:
    """A real adapter of one user, trained without an emulator."""
    base = run.base()
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    plan = emulator.make_plan(model, base_hash=base.hash, adapter_layers=2, drop_ratio=0.0)
    blocks = tokenize(load_user(run.config.data, user).train, tokenizer, max_tokens=48)
    states = cache_states(emulator.with_layers(model, plan.bottom), blocks, pad_id=tokenizer.pad_token_id)
    start = LoraAdapter(
        initial_pairs(emulator.target_shapes(model, plan), rank=4, seed=0), str(base.path), base.hash
    )
    options = TrainOptions(steps=steps, learning_rate=1e-2)
    return fit(emulator.TopModel(model, plan), plan, states, start=start, options=options).adapter


@pytest.fixture
def reconfigured(run: Run) -> Callable[..., Run]:
    """The same run folder with some sections' values replaced: `reconfigured(gate={"…": 1.0})`."""

    def change(**sections: dict[str, object]) -> Run:
        from soppu import config as configuration
        from soppu.files import write_text

        replaced = {
            name: dataclasses.replace(getattr(run.config, name), **values)
            for name, values in sections.items()
        }
        config = dataclasses.replace(run.config, **replaced)
        write_text(run.folder / "config.toml", configuration.dump(config))
        return open_run(str(run.folder))

    return change


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
