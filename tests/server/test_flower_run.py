"""Modes in a real simulation: SuperLink, Ray actors, files between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from soppu import config as configuration
from soppu import files
from soppu.config import Config
from soppu.federation import simulation
from soppu.registry import Registry
from tests.server.small_run import builder

pytestmark = [pytest.mark.slow, pytest.mark.long]
USERS = ["alice", "bob"]


def run(config: Config, root: Path) -> dict[str, Any]:
    path = root / "run.toml"
    files.write_text(path, configuration.dump(config))
    app = Path(__file__).parents[2]
    return simulation.run(
        simulation.Simulation(app=app, config=path, workdir=root / "work", users=len(USERS), timeout_s=400)
    )


def test_fedsa_and_dual_run_in_processes_of_their_own(
    tmp_path: Path, tiny_base: Path, write_users: Callable[[Path, Mapping[str, int]], Path]
) -> None:
    """A user's own part goes from one actor to another, and what comes in is what the mode shares."""
    configs = {}
    for mode in ("fedsa", "dual"):
        root = tmp_path / mode
        configs[mode] = builder(root, tiny_base, write_users)(
            data={"users": USERS},
            align={"warmup_steps": 1, "round_steps": 0},
            federation={"mode": mode, "hello_timeout_s": 120, "client_state": str(root / "clients")},
        )
    with ThreadPoolExecutor() as pool:
        done = dict(
            zip(configs, pool.map(lambda mode: run(configs[mode], tmp_path / mode), configs), strict=True)
        )
    for mode, found in done.items():
        logs = found["rounds"]
        assert found["adapters"].keys() == set(USERS) and found["refused"] == {}
        assert [{one["own_since"] for one in log["received"].values()} for log in logs] == [{0}, {1}, {2}]
        assert logs[0]["bytes_up"] < logs[2]["bytes_up"]
        registry = Registry.open(configs[mode].registry.root)
        one, other = (registry.get_adapter(found["adapters"][user]) for user in USERS)
        for name, pair in one.pairs.items():
            rows = pair.rank if mode == "fedsa" else 1
            assert torch.equal(pair.A[:rows], other.pairs[name].A[:rows])
            assert not torch.equal(pair.B, other.pairs[name].B)
