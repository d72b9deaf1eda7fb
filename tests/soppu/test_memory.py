"""What a federation takes: the estimate follows the settings it names, and is about what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from soppu import config as configuration
from soppu.config import Config
from soppu.errors import ConfigError
from soppu.federation import emulator, memory
from soppu.federation.memory import Sizes

BASE: dict[str, Any] = {"data": {"users": ["a", "b"], "max_tokens": 32}, "frozen_dtype": "bfloat16"}


def parts_of(model: PreTrainedModel, changes: dict[str, Any]) -> dict[str, int]:
    config = made(changes)
    plan = planned(model, config)
    return memory.client_parts(config, plan, Sizes.of(model, plan))


def made(changes: dict[str, Any]) -> Config:
    values: dict[str, Any] = {name: dict(v) if isinstance(v, dict) else v for name, v in BASE.items()}
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    return configuration.from_dict(values)


def planned(model: PreTrainedModel, config: Config) -> emulator.LayerPlan:
    return emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=config.plan.drop_ratio)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"plan.drop_ratio": 0.5}, {"plan.drop_ratio": 0.0}),
        ({"data.max_tokens": 64}, {"data.max_tokens": 512}),
        ({"data.train_examples": 8}, {"data.train_examples": 640}),
        ({"frozen_dtype": "bfloat16"}, {"frozen_dtype": "float32"}),
        ({"frozen_dtype": "nf4"}, {"frozen_dtype": "bfloat16"}),
        ({"compute_dtype": "bfloat16"}, {"compute_dtype": "float32"}),
        ({"federation.form": "core", "federation.together": 1}, {"federation.form": "core"}),
    ],
)
def test_what_the_message_tells_to_change_does_help(
    make_model: Callable[..., PreTrainedModel], less: dict[str, Any], more: dict[str, Any]
) -> None:
    model = make_model("llama", hidden_size=512, intermediate_size=1024)
    small, large = parts_of(model, less), parts_of(model, more)
    assert all(small[name] <= large[name] for name in small)
    assert sum(small.values()) < sum(large.values())
    assert memory.client_bytes(small) <= memory.client_bytes(large)


def test_a_simulation_that_does_not_fit_names_the_keys(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = make_model("llama"), made({})
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 2)
    memory.check(config, model, planned(model, config))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * memory.PROCESS)
    with pytest.raises(ConfigError, match=r"2 clients at once .* change federation.client_cpus .*data\."):
        memory.check(config, model, planned(model, config))
    fewer = made({"federation.client_cpus": 2})  # as the message says
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * memory.PROCESS)
    memory.check(fewer, model, planned(model, fewer))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"client_gpus": 0.5}, r"federation.client_gpus = 0.5, this machine has 0 CUDA devices"),
        ({"client_device": "cuda"}, "federation.client_device = 'cuda': .*federation.client_gpus is above 0"),
    ],
)
def test_gpus_that_are_not_there_are_refused_before_ray_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fault: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=fault):
        memory.check_gpus(configuration.from_dict({"federation": changes}))


def test_shares_of_gpus_that_cannot_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for changes in ({"client_gpus": 1.5}, {"client_gpus": 0.5, "client_device": "cuda:1"}):
        with pytest.raises(ConfigError, match="allowed:"):
            memory.check_gpus(configuration.from_dict({"federation": changes}))
    half = configuration.from_dict({"federation": {"client_gpus": 0.5, "client_device": "cuda"}})
    memory.check_gpus(half)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 64)
    assert memory.clients_at_once(half) == 4


@pytest.mark.parametrize(
    ("users", "cores", "nodes"), [(1, 8, 1), (7, 8, 1), (8, 8, 2), (16, 2, 2), (16, 8, 4), (1000, 8, 8)]
)
def test_cores_are_trained_on_all_of_a_machine_and_some_users_together(
    monkeypatch: pytest.MonkeyPatch, users: int, cores: int, nodes: int
) -> None:
    monkeypatch.setattr(memory.os, "cpu_count", lambda: cores)
    named = {"data": {"users": [f"u{n}" for n in range(users)]}, "federation": {"form": "core"}}
    assert memory.core_nodes(configuration.from_dict(named)) == nodes


MEASURED = """
import sys, torch
from pathlib import Path
from soppu import models
from soppu.data import Block
from soppu.federation import emulator, memory
from soppu.federation.attach import initial_pairs
from soppu.adapter import LoraAdapter
from soppu.federation.client_part import ClientPart
from soppu.federation.train import TrainOptions, cache_states, fit
from tests.soppu.test_memory import made, planned
torch.set_num_threads(1)
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
base = models.resolve(sys.argv[1], cache=Path(sys.argv[1]))
config, skeleton = made({"data.max_tokens": 64}), models.skeleton(base)
plan = planned(skeleton, config)
p = torch.ones(2, requires_grad=True)
p.sum().backward()
torch.optim.AdamW([p]).step()  # its imports are not the client's
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
part = ClientPart(base, plan, dtype="bfloat16", compute=torch.bfloat16)
ids = torch.randint(2, 300, (16, 64))
with part.bottom() as bottom:
    states = cache_states(bottom, [Block(row, row) for row in ids], pad_id=1)
start = LoraAdapter(initial_pairs(part.shapes, rank=8, seed=0))
fit(part.top, plan, states, start=start, options=TrainOptions(steps=3))
found = resident("VmHWM") - before
print(found, memory.client_bytes(memory.client_parts(config, plan, memory.Sizes.of(skeleton, plan))))
"""


@pytest.mark.long
def test_the_estimate_is_within_a_factor_of_two_of_a_real_client(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model("llama", hidden_size=1024, intermediate_size=4096).bfloat16()
    model.save_pretrained(tmp_path / "base")
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "base")]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found, estimated = map(int, done.stdout.split()[-2:])
    assert 0.5 < estimated / found < 2.0, (found, estimated)
