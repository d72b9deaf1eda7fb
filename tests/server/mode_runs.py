"""Runs of one mode: two users, two shared rounds, and what was sent and answered in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from torch import Tensor

from clients.workbench import workbench
from server.federation import Federation
from soppu.adapter import LoraAdapter
from soppu.config import Config
from tests.server.grid import InProcessGrid
from tests.server.small_run import WriteUsers, builder, federate, round_of, shared_state, stored

NODES = [{"partition-id": n} for n in range(2)]
ROUNDS = 2
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Run:
    """One that has ended."""

    config: Config
    workdir: Path
    grid: InProcessGrid
    federation: Federation

    def asked(self, number: int) -> list[State]:
        """What of an adapter was sent to the two users in a round."""
        return [shared_state(m) for m in self.grid.of_type("train") if round_of(m) == number]

    def replies(self, number: int) -> list[Message]:
        """To training: the n-th pair of this attempt."""
        replies = [m for m in self.grid.replies if "who" in m.content]
        return replies[2 * (number - 1) : 2 * number]

    def answered(self, number: int) -> list[State]:
        """What they sent back."""
        return [m.content["arrays"].to_torch_state_dict() for m in self.replies(number)]

    def adapters(self) -> dict[str, LoraAdapter]:
        return stored(self.config, self.workdir)


Start = Callable[..., Run]


def starter(root: Path, base: Path, write_users: WriteUsers) -> Start:
    """`start(mode="fedsa", grid=…)`: two users, two shared rounds, no alignment between them."""

    def start(*, name: str = "work", grid: InProcessGrid | None = None, **settings: Any) -> Run:
        made = {"client_state": str(root / name / "clients"), **settings}
        config = builder(root, base, write_users)(
            data={"users": ["alice", "bob"]},
            align={"warmup_steps": 2, "round_steps": 0},
            federation={"rounds": ROUNDS, **made},
            registry={"root": str(root / name / "registry")},
        )
        workbench.cache_clear()
        return Run(config, root / name, *federate(config, root / name, grid or InProcessGrid(NODES)))

    return start


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Start:
    return starter(tmp_path, tiny_base, write_users)
