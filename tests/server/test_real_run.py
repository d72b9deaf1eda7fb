"""A federated run as it is in earnest, with `flwr run` and Ray, whose processes are killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from soppu import config as configuration
from soppu import files
from soppu.federation import simulation
from soppu.federation.simulation import Simulation

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
USERS = {"alice": 12, "bob": 9, "carol": 10}


@dataclass(frozen=True)
class Ended:
    """What a run left, and what was done to it."""

    result: dict[str, Any]
    killed: set[int]
    left: list[int]  # processes of it that are still there


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    write_users: Callable[[Path, Mapping[str, int]], Path],
) -> Simulation:
    root = tmp_path_factory.mktemp("real")
    write_users(root / "users", USERS)
    write_users(root / "public", {"nobody": 5})
    run = Simulation(ROOT, root / "run.toml", root / "work", users=len(USERS), timeout_s=400)
    files.write_text(run.config, configuration.dump(settings(root, tiny_base)))
    return run


@pytest.fixture(scope="module")
def ended(prepared: Simulation) -> Ended:
    """One client is killed when it is asked who it is, another in the first round."""
    mark, killed = simulation.mark_of(prepared.workdir), set()
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(simulation.run, prepared)
        for note in ("asking", "round 1"):
            wait_for(prepared.workdir, note, or_done=under_way)
            killed.add(kill_busy_client(mark, but=killed))
        result = under_way.result(timeout=400)
    return Ended(result, killed, pids(mark))


def settings(root: Path, base: Path) -> configuration.Config:
    return configuration.from_dict(
        {
            "base": {"model": str(base)},
            "data": {
                "source": str(root / "users"),
                "users": list(USERS),
                "train_examples": 6,
                "heldout_examples": 2,
                "min_examples": 4,
                "max_tokens": 48,
            },
            "plan": {"adapter_layers": 2, "drop_ratio": 0.34},
            "lora": {"rank": 2, "alpha": 4},
            "align": {"source": str(root / "public"), "warmup_steps": 4, "round_steps": 2, "rank": 2},
            "federation": {
                "rounds": 1,
                "local_steps": 10,
                "personal_steps": 3,
                "batch_size": 2,
            },
            "registry": {"root": str(root / "registry")},
        }
    )


def wait_for(workdir: Path, note: str, *, or_done: Future[Any]) -> None:
    path = workdir / "progress.json"
    while not (path.exists() and note in json.loads(path.read_text())["note"]):
        assert not or_done.done(), or_done.result()
        time.sleep(0.02)


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(simulation._MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def pids(mark: str) -> list[int]:
    return [process.pid for process in marked(mark)]


def kill_busy_client(mark: str, *, but: set[int]) -> int:
    """SIGKILL to one process that is working on a message."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for process in marked(mark):
            try:
                if process.pid not in but and "ray::Client.run" in " ".join(process.cmdline()):
                    process.kill()
                    return process.pid
            except psutil.Error:
                continue
        time.sleep(0.01)
    raise AssertionError("no client was at work")


def test_a_client_that_is_killed_has_its_place_again_within_the_round(ended: Ended) -> None:
    assert len(ended.killed) == 2
    assert ended.result["refused"] == {}
    assert ended.result["adapters"].keys() == USERS.keys()
    for log in ended.result["rounds"]:
        assert sorted(log["accepted"]) == sorted(USERS), log
        assert not log["lost"] and not log["refused"]


def test_nothing_of_a_run_is_left_when_it_has_ended(ended: Ended) -> None:
    assert ended.left == []


def test_a_run_whose_process_is_killed_leaves_nothing_behind(prepared: Simulation, tmp_path: Path) -> None:
    """Neither a SuperLink nor what it has started: they end although nobody is left to end them."""
    run = dataclasses.replace(prepared, workdir=tmp_path / "work")
    mark = simulation.mark_of(run.workdir)
    code = f"from pathlib import PosixPath; from soppu.federation.simulation import *; run({run!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def superlink() -> list[psutil.Process]:
        return [process for process in marked(mark) if "flower-superlink" in " ".join(process.cmdline())]

    until(superlink)
    before = pids(mark)
    parent.kill()
    parent.wait()
    until(lambda: not marked(mark))
    assert len(before) >= 2  # the SuperLink and who watches over it


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
