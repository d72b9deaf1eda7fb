"""One federated run as it is in earnest, with `flwr run` and Ray, in which clients are killed and hang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from soppu import config as configuration
from soppu import files
from soppu.federation import simulation
from soppu.federation.simulation import Simulation

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
USERS = {"alice": 12, "bob": 9, "carol": 10}


@dataclass(frozen=True)
class Ended:
    """What a run left, and what was done to it."""

    result: dict[str, Any]
    killed: int
    left: list[int]  # processes of it that are still there
    log: str


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    write_users: Callable[[Path, Mapping[str, int]], Path],
) -> Ended:
    """Carol's client hangs in the first round; the process of another is killed in the last."""
    root = tmp_path_factory.mktemp("real")
    source = write_users(root / "users", USERS)
    write_users(root / "public", {"nobody": 5})
    run = Simulation(ROOT, root / "run.toml", root / "work", users=len(USERS), timeout_s=300)
    files.write_text(run.config, configuration.dump(settings(root, tiny_base)))
    mark = simulation.mark_of(run.workdir)
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(simulation.run, run)
        text = source / "carol.jsonl"
        wait_for(run.workdir, "aligning")
        text.rename(root / "carol.jsonl")
        os.mkfifo(text)  # nobody ever writes: whoever opens it waits
        wait_for(run.workdir, "round 2")
        (root / "carol.jsonl").replace(text)
        killed = kill_busy_client(mark)
        result = under_way.result(timeout=300)
    return Ended(result, killed, pids(mark), (run.workdir / "flower.log").read_text())


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
            "align": {"source": str(root / "public"), "warmup_steps": 40, "round_steps": 2, "rank": 2},
            "federation": {
                "rounds": 1,
                "local_steps": 2,
                "personal_steps": 400,
                "batch_size": 2,
                "hello_timeout_s": 60,
                "round_timeout_s": 15,
            },
            "registry": {"root": str(root / "registry")},
        }
    )


def wait_for(workdir: Path, note: str) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        path = workdir / "progress.json"
        if path.exists() and note in json.loads(path.read_text())["note"]:
            return
        time.sleep(0.02)
    raise AssertionError(f"never came to {note!r}: {simulation.tail(workdir / 'flower.log')}")


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


def kill_busy_client(mark: str) -> int:
    """SIGKILL to one process that is working on a message."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in marked(mark):
            try:
                if "ray::Client.run" in " ".join(process.cmdline()):
                    process.kill()
                    return process.pid
            except psutil.Error:
                continue
        time.sleep(0.02)
    raise AssertionError("no client was at work")


def test_x(ended: Ended) -> None:
    print(json.dumps(ended.result, indent=1)[:6000])
    print(ended.killed, ended.left)
