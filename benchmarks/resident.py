"""A bundle of many users, few of them in memory: benchmarks/results/resident.json.

    python -m benchmarks.resident [--users 1000 --users 100000] [--asked 1000] [--folder DIR]

`soppu serve` with a bundle of the pipeline's shape (`many_users`) in its state folder, and a bound of 32 MiB
for users in memory. `first_start_s` is the start that meets the file for the first time, and reads it whole;
`start_s` any later one, from the process to the first healthy answer, which loads Python and the model too:
`empty_start_s` is what that takes without a bundle, `open_ms` what opening the bundle again takes of it. Then
users who were never asked for (`cold`), of a file that is in no cache of the system, take turns with the same
users again (`warm`): milliseconds to the first token over HTTP, one request at a time, no prompts shared.
`rss` is the server's memory in bytes, when it has started, at its most, and at the end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import requests
import torch

from benchmarks import many_users, served
from benchmarks.record import RESULTS, ROOT, circumstances, store
from soppu.compress.bundle.index import path_of
from soppu.compress.bundle.shelf import Shelf
from soppu.federation.simulation import free_port

LIMIT_MIB = 32
PROMPT = "def read_file(path):"
_WAIT = 1800.0  # seconds for a start


class Server:
    """`soppu serve` on a state folder, in a process of its own."""

    def __init__(self, state: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        options = ["--model", served.base().name, "--state", str(state), "--resident-mib", str(LIMIT_MIB)]
        options += ["--port", self.url.rpartition(":")[2], "--prefix-tokens", "0", "--no-read-ahead"]
        options += ["--cache", str(ROOT / ".soppu" / "models"), "--max-batch", "4"]
        begun = time.perf_counter()
        with (state / "log").open("ab") as log:
            command = [sys.executable, "-m", "soppu.cli", "serve", *options]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not self._healthy():
            if self.process.poll() is not None or time.perf_counter() - begun > _WAIT:
                raise RuntimeError((state / "log").read_text()[-2000:])
            time.sleep(0.02)
        self.seconds = time.perf_counter() - begun
        self.session = requests.Session()

    def _healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    @property
    def rss(self) -> int:
        """Bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def processor(self) -> float:
        """Seconds of processor time so far, which other processes on the machine do not stretch."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def first_token(self, user: str) -> float:
        """Milliseconds from the request to its first token."""
        parameters = {"adapter_id": user, "max_new_tokens": 2}
        begun = time.perf_counter()
        body = {"inputs": PROMPT, "parameters": parameters}
        with self.session.post(f"{self.url}/generate_stream", json=body, stream=True, timeout=60) as answer:
            answer.raise_for_status()
            line = next(line for line in answer.iter_lines() if line.startswith(b"data:"))
            taken = 1e3 * (time.perf_counter() - begun)
            assert b'"token"' in line, line
            for _ in answer.iter_lines():
                pass
        return taken


def figures(url: str) -> dict[str, float]:
    """What a server's `/metrics` say of users in memory."""
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    kept = [line.rsplit(" ", 1) for line in lines if line.startswith(("soppu_resident", "soppu_bundle"))]
    return {name: float(value) for name, value in kept}


@contextmanager
def server(state: Path) -> Iterator[Server]:
    """A server that is ended afterwards."""
    started = Server(state)
    try:
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)


def put(state: Path, users: int, components: int) -> Path:
    """A state folder that holds one bundle, active; the bundle's file."""
    (state / "bundles").mkdir(parents=True)
    bundle_id = many_users.write(state / "new", users, components_each=components)
    path = state / "bundles" / f"{bundle_id}.safetensors"
    os.replace(state / "new", path)
    held = {"active": bundle_id, "adapters": {}, "base_hash": served.base().hash, "bundles": [bundle_id]}
    (state / "state.json").write_text(json.dumps(held | {"format": 1}))
    return path


def drop_caches(path: Path) -> None:
    """Have the system forget what it holds of a file."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def opening(path: Path) -> float:
    """Milliseconds to open the bundle and find a user: what of a start depends on how many there are."""
    begun = time.perf_counter()
    shelf = Shelf.open(path)
    assert shelf.users.place(many_users.name(len(shelf.users) - 1)) == len(shelf.users) - 1
    return 1e3 * (time.perf_counter() - begun)


def ask(started: Server, users: int, asked: int) -> dict[str, Any]:
    """Cold users and warm ones in turn."""
    chosen = random.Random(0).sample(range(users), min(asked, users))
    for _ in range(5):
        started.first_token("")  # what torch makes at its first forward
    started.first_token(many_users.name(chosen[0]))
    memory, before = [started.rss], figures(started.url)
    taken: dict[str, list[float]] = {"cold": [], "warm": []}
    processor = {"cold": 0.0, "warm": 0.0}
    for number in chosen[1:]:
        for name, times in taken.items():
            begun = started.processor
            times.append(started.first_token(many_users.name(number)))
            processor[name] += started.processor - begun
        memory.append(started.rss)
    cold, warm = taken["cold"], taken["warm"]
    after = figures(started.url)
    reads = 'soppu_resident_reads_total{outcome="success"}'
    assert after[reads] - before[reads] == len(cold)
    return {
        "cold_ms": _percentiles(cold),
        "warm_ms": _percentiles(warm),
        "p99_difference_ms": float(np.percentile(cold, 99) - np.percentile(warm, 99)),
        "processor_ms": {name: 1e3 * seconds / len(cold) for name, seconds in processor.items()},
        "asked": len(cold),
        "rss": memory[-1],
        "rss_at_first": memory[0],
        "rss_most": max(memory),
        "limit_bytes": LIMIT_MIB << 20,
        "figures": after,
    }


def _percentiles(taken: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(taken, p)) for p in (50, 90, 99)}


def measure(folder: Path, users: int, asked: int, components: int) -> dict[str, Any]:
    """One row of the results."""
    state = folder / f"state-{users}"
    begun = time.perf_counter()
    path = put(state, users, components)
    row: dict[str, Any] = {"users": users, "components": components, "written_s": time.perf_counter() - begun}
    row |= {"bytes": path.stat().st_size, "bytes_per_user": path.stat().st_size / users}
    with server(state) as started:
        row["first_start_s"] = started.seconds
    row["index_bytes"] = path_of(path).stat().st_size
    row["open_ms"] = opening(path)
    drop_caches(path)
    with server(state) as started:
        row |= {"start_s": started.seconds, "rss_started": started.rss}
        row |= ask(started, users, asked)
    path.unlink()
    return row


@click.command()
@click.option("--users", multiple=True, default=(1000, 100_000), show_default=True, help="Bundle sizes.")
@click.option("--asked", default=1000, show_default=True, help="Users who ask.")
@click.option("--components", default=many_users.COMPONENTS, show_default=True, help="Of a user, a module.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="On a disk with room.")
def main(users: tuple[int, ...], asked: int, components: int, folder: Path | None) -> None:
    """Measure, and write the result file; rows of other sizes in it are kept."""
    kept: list[dict[str, Any]] = []
    if (RESULTS / "resident.json").exists():
        held = json.loads((RESULTS / "resident.json").read_text())
        kept = [row for row in held["rows"] if row["users"] not in users]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "empty").mkdir()
        for _ in range(2):  # the first may compile, and fills the system's cache
            with server(Path(name) / "empty") as started:
                empty, rss = started.seconds, started.rss
        rows = []
        for count in users:
            row = measure(Path(name), count, asked, components)
            rows.append(row | {"empty_start_s": empty, "empty_rss": rss, "load_average": os.getloadavg()})
            click.echo(json.dumps(rows[-1], indent=1))
    what = {
        "what": "soppu serve, users of a bundle in memory within a bound; the machine is shared with others",
        "model": served.base().name,
        "shape": "pipeline",
        "numbers": f"own integers of width {many_users.WIDTH} and coordinates, k = {many_users.RANK}",
        "pages": f"{many_users.PAGE} users each, {many_users.DISTINCT} distinct ones repeated",
        "threads": torch.get_num_threads(),
        "rows": sorted([*kept, *rows], key=lambda row: row["users"]),
    }
    click.echo(f"written: {store('resident', circumstances(seed=0) | what)}")


if __name__ == "__main__":
    main()
