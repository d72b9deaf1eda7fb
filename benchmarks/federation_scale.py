"""How far one machine goes, and what the machinery costs: benchmarks/results/federation_scale.json.

    python -m benchmarks.federation_scale --part memory [--users 200]
    python -m benchmarks.federation_scale --part overhead [--rounds 2]

`memory`: a simulation of many users of the demo's base model, a few steps each. What all its processes hold
(their own pages, and the whole of what they share once) is looked at every two seconds, beside a simulation
of a tenth of the users.

`overhead`: the demo's training through `prefect deployment run` (Prefect's server and worker, Flower's
SuperLink, Ray's actors) beside a bare loop over the same clients in one process, in turn. Both are timed from
the command to the last adapter; the bare loop has every core, the simulation one core for each of its actors.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from deploy.stack import Stack, down, up
from server.federation import Federation
from soppu.federation.simulation import free_port, mark_of
from soppu.stages import federate as stage
from soppu.stages.run import FEDERATION, open_run, prepare
from tests.flows.driver import Pipeline, until
from tests.server.grid import InProcessGrid, identify

DEMO = ROOT / "configs" / "demo.toml"
# One step a turn, so that two hundred users are minutes and not hours; the memory is the demo model's.
SHORT = {
    "data.train_examples": 4,
    "data.min_examples": 1,
    "data.validation_examples": 1,
    "data.heldout_examples": 2,
    "data.max_tokens": 32,
    "align.warmup_steps": 0,
    "align.round_steps": 0,
    "federation.rounds": 2,
    "federation.local_steps": 1,
    "federation.personal_steps": 1,
    "federation.personal_check_every": 1,
}
_EVERY_S = 2.0


@dataclass
class Watch:
    """Looks at the processes of a simulation until told to stop."""

    mark: str
    seen: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(_EVERY_S):
            if held := sum(_held(process) for process in _marked(self.mark)):
                self.seen.append((time.monotonic() - self._started, held))


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if mark in process.environ().values():
                found.append(process)
    return found


def _held(process: psutil.Process) -> int:
    """Its share of memory, in bytes: pages of several processes count in parts (PSS)."""
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


def texts(folder: Path, users: int) -> None:
    """Users of a few lines each."""
    folder.mkdir()
    for number in range(users):
        user = f"user{number:04}"
        lines = [
            {"user_id": user, "prompt": f"say {n}: ", "completion": f"{user} says {n}"} for n in range(9)
        ]
        (folder / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def memory_of(users: int) -> dict[str, Any]:
    """A simulation of so many users, and what it held over time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        texts(folder / "users", users)
        told = SHORT | places(folder) | {"data.source": str(folder / "users"), "data.users": []}
        run = prepare(str(DEMO), told)
        workdir = open_run(run).folder / FEDERATION
        started = time.monotonic()
        with Watch(mark_of(workdir)) as watch:
            stage.federate(run, on_progress=lambda told: click.echo(f"  {users} users: {told['note']}"))
        seconds = time.monotonic() - started
        result = json.loads((workdir / "result.json").read_text())
    held = [amount for _, amount in watch.seen]
    quarter = len(held) // 4
    return {
        "users": users,
        "adapters": len(result["adapters"]),
        "seconds": seconds,
        "peak_bytes": max(held),
        "median_bytes_by_quarter": [
            statistics.median(held[at * quarter : (at + 1) * quarter]) for at in range(4)
        ],
        "samples": len(held),
    }


def places(folder: Path) -> dict[str, Any]:
    """Keys for a run that leaves nothing outside its folder."""
    return {
        "runs": str(folder / "runs"),
        "registry.root": str(folder / "registry"),
        "federation.client_state": str(folder / "clients"),
        "base.cache": str(ROOT / ".soppu" / "models"),
        "serve.state": str(folder / "serve"),
    }


def bare(folder: str) -> None:
    """The same training as one loop over the clients in this process."""
    identify()
    run = open_run(prepare(str(DEMO), places(Path(folder))))
    users = len(run.config.data.users)
    grid = InProcessGrid([{"partition-id": number} for number in range(users)])
    workdir = run.folder / FEDERATION
    workdir.mkdir(parents=True, exist_ok=True)
    Federation(run.config, workdir).run(grid)


def by_loop() -> float:
    """Seconds of the bare loop, its process included."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "benchmarks.federation_scale", "--bare", folder], check=True)
        return time.monotonic() - started


def by_pipeline(stack: Stack) -> float:
    """Seconds from `prefect deployment run` to the last adapter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        overrides = places(Path(name)) | {"serve.url": f"http://127.0.0.1:{free_port()}"}
        pipeline = Demo(stack, Path(name), overrides)
        started = time.monotonic()
        flow_run = pipeline.start("soppu/full-pipeline")
        until(lambda: list(Path(name).glob("runs/.federations/*/result.json")), timeout=3600, every=0.1)
        seconds = time.monotonic() - started
        pipeline.completed(flow_run)  # what comes after is not counted, but has to end
        return seconds


class Demo(Pipeline):
    """The pipeline with the demo's settings."""

    @property
    def parameters(self) -> dict[str, Any]:
        """As `make demo` gives them."""
        return {"config": str(DEMO), "overrides": self.overrides}


def overhead(rounds: int) -> dict[str, Any]:
    """Both ways in turn; the ratio of their medians."""
    seconds: dict[str, list[float]] = {"pipeline": [], "loop": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        stack = Stack(f"http://127.0.0.1:{free_port()}/api", folder / "stack", folder / "stack" / "serve")
        try:
            up(stack)
            for _ in range(rounds):
                seconds["loop"].append(by_loop())
                seconds["pipeline"].append(by_pipeline(stack))
                click.echo(json.dumps(seconds))
        finally:
            down(stack)
    medians = {way: statistics.median(runs) for way, runs in seconds.items()}
    return {"seconds": seconds, "overhead": medians["pipeline"] / medians["loop"] - 1}


@click.command()
@click.option("--part", "parts", multiple=True, default=("memory", "overhead"))
@click.option("--users", default=200, show_default=True, help="Simulated users of the memory part.")
@click.option("--rounds", default=2, show_default=True, help="Runs of each way in the overhead part.")
@click.option("--bare", "folder", default="", hidden=True)
def main(parts: tuple[str, ...], users: int, rounds: int, folder: str) -> None:
    """Measure the parts asked for, and keep the others as the file has them."""
    if folder:
        bare(folder)
        return
    values: Mapping[str, Any] = read_result("federation_scale")
    if "memory" in parts:
        few, many = memory_of(users // 10), memory_of(users)
        ratio = many["peak_bytes"] / few["peak_bytes"]
        values = {**values, "memory": {"few": few, "many": many, "peak_ratio": ratio}}
    if "overhead" in parts:
        values = {**values, "overhead": overhead(rounds)}
    packages = ("torch", "prefect", "flwr", "ray")
    click.echo(f"wrote {store('federation_scale', {**values, **circumstances(seed=0, packages=packages)})}")


if __name__ == "__main__":
    main()
