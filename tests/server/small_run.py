"""A small federation of three users in one process: its configuration, its run, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from clients.workbench import workbench
from server.federation import Federation
from soppu import config as configuration
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.federation import wire
from soppu.registry import Registry
from tests.server.grid import InProcessGrid

USERS = {"alice": 12, "bob": 9, "carol": 10}
NODES = [{"partition-id": n} for n in range(len(USERS))]


class Killed(BaseException):
    """The process died: nothing in between may catch this."""


WriteUsers = Callable[[Path, Mapping[str, int]], Path]
Build = Callable[..., Config]


def builder(root: Path, base: Path, write_users: WriteUsers) -> Build:
    """`build(federation={"rounds": 1})`: a small run below `root`; the sections given are merged in."""
    source = write_users(root / "users", USERS)
    public = write_users(root / "public", {"nobody": 5})

    def build(**changes: dict[str, Any]) -> Config:
        amounts = {"train_examples": 6, "heldout_examples": 2, "min_examples": 4, "max_tokens": 48}
        steps = {"rounds": 2, "local_steps": 2, "personal_steps": 3, "batch_size": 2, "hello_timeout_s": 1}
        aligning = {"warmup_steps": 8, "round_steps": 2, "rank": 2, "learning_rate": 3e-3}
        sections: dict[str, dict[str, Any]] = {
            "base": {"model": str(base)},
            "data": {"source": str(source), "users": list(USERS), **amounts},
            "plan": {"adapter_layers": 2, "drop_ratio": 0.34},
            "lora": {"rank": 2, "alpha": 4},
            "align": {"source": str(public), **aligning},
            "federation": steps,
            "registry": {"root": str(root / "registry")},
        }
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values}
        return configuration.from_dict(sections)

    return build


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Build:
    return builder(tmp_path, tiny_base, write_users)


def federate(
    config: Config, workdir: Path, grid: InProcessGrid | None = None
) -> tuple[InProcessGrid, Federation]:
    grid = grid or InProcessGrid(NODES)
    federation = Federation(config, workdir)
    federation.run(grid)
    return grid, federation


def result(workdir: Path) -> dict[str, Any]:
    return dict(json.loads((workdir / "result.json").read_text()))


def user_of(message: Message) -> str:
    return list(USERS)[message.metadata.dst_node_id - 100]


def round_of(message: Message) -> int:
    return int(message.content["config"]["server-round"])


def stored(config: Config, workdir: Path) -> dict[str, LoraAdapter]:
    registry = Registry.open(config.registry.root)
    return {user: registry.get_adapter(held) for user, held in result(workdir)["adapters"].items()}


def shared_state(message: Message) -> dict[str, Tensor]:
    return wire.split_state(message.content["arrays"].to_torch_state_dict())[0]


@dataclass(frozen=True)
class Finished:
    """A run that has ended, for tests that only look at it."""

    config: Config
    workdir: Path
    grid: InProcessGrid
    federation: Federation

    @property
    def replies(self) -> list[Message]:
        """To training, in the order of the rounds."""
        return [message for message in self.grid.replies if "who" in message.content]


def finished(root: Path, config: Config) -> Finished:
    workbench.cache_clear()
    torch.set_num_threads(1)  # as in the tests that are held against it: sums depend on how they are split
    return Finished(config, root / "work", *federate(config, root / "work"))
