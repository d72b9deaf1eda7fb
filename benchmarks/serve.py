"""Serving a thousand users, beside the base model alone: benchmarks/results/serve.json.

    make vllm && python -m benchmarks.serve
    python -m benchmarks.serve --shape pipeline --method residual --turns largest   # adds its rows

One client, one machine, one run. All servers are up at once and take turns; only one is asked at a time.

    base           vLLM, LoRA off
    stock          vLLM's own multi-LoRA at its best: only the layers that adapters change are wrapped
    stock-default  the same as it comes: every layer it can wrap is; in the largest turn only, for it is slow
    soppu          vLLM with this project's plugin and a bundle of all users
    embedded       this project's own server, with the same bundle; `embedded-base` is its base model

Shapes and methods of the bundle are told by `served`; every row says which it is of, and the relative errors.

vLLM's own LoRA keeps `--slots` adapters resident, which is as many bytes as the cores of all users together;
all others are held in the CPU's memory, and loaded before anything is timed. So are the users of our servers,
who read them ahead.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import requests

from benchmarks import load, personal_ground, served
from benchmarks.load import Endpoint, Traffic
from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from benchmarks.resident import figures
from soppu.federation.simulation import free_port
from soppu.targets import process

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
COMMON = ("--max-model-len", "512", "--max-num-seqs", "16")
SYSTEMS = ("base", "soppu", "stock", "stock-default", "embedded-base", "embedded")
FOLDERS = 32  # distinct PEFT folders; vLLM loads every user's by itself all the same
ADMIN_TOKEN = "of-the-benchmark"
_LORA_RANKS = (16, 32, 64, 128, 256)  # that vLLM's own LoRA knows, from our adapters' on
_START = 900.0
_WARM = 32  # requests before anything is timed
FIRST = ("qv30", "cores", "all")  # what the head of the file is of
_AHEAD = 400.0  # seconds for users to be read ahead
_SETTLE = 2.0  # seconds: vLLM's processes spin for one after their last answer, on the next one's cores


@dataclass(frozen=True)
class System:
    """A server that is up: how it is asked, its process, and whether its users have adapters."""

    endpoint: Endpoint
    pid: int
    adapted: bool

    def memory(self) -> int:
        """Bytes its processes hold, pages they share counted once."""
        family = psutil.Process(self.pid)
        return int(sum(one.memory_full_info().pss for one in [family, *family.children(recursive=True)]))


@dataclass(frozen=True)
class Turn:
    """What every system is asked in one turn.

    Attributes:
        users: how many there are to draw from; uniform traffic draws nobody twice while it can.
        repeats: turns of this kind; the systems alternate in each.
    """

    users: int
    zipf: bool
    requests: int
    repeats: int


@contextmanager
def server(
    folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[int, int]]:
    """A server on a free port, healthy: (port, pid). `command` has "{port}" where the port goes."""
    port = free_port()
    words = [word.format(port=port) for word in command]
    known = {"SOPPU_ADMIN_TOKEN": ADMIN_TOKEN, **environment}
    launch = process.Launch(words, folder / f"{name}.log", folder / f"{name}.pid", known)
    began = time.perf_counter()
    pid = process.start(launch, ready=lambda: _healthy(port), timeout=_START)
    click.echo(f"{name}: up after {time.perf_counter() - began:.0f} s")
    try:
        yield port, pid
    finally:
        process.stop(launch.pid_file)


def _healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except requests.RequestException:
        return False


def vllm(
    stack: ExitStack, folder: Path, fleet: served.Served, *, name: str, options: Sequence[str] = ()
) -> System:
    """A vLLM server; with the plugin where `name` is "soppu"."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if name == "soppu":
        environment |= {"SOPPU_BUNDLE": str(fleet.path), "SOPPU_STATE": f"{fleet.path}.state"}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if name.startswith("stock") else {}
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--port", "{port}"]
    command += ["--model", str(fleet.base.path), "--served-model-name", "base", *COMMON, *options]
    port, pid = stack.enter_context(server(folder, name, command, environment))
    return System(Endpoint(port, "openai", "base"), pid, adapted=name != "base")


def stock(stack: ExitStack, folder: Path, fleet: served.Served, *, slots: int, restricted: bool) -> System:
    """The multi-LoRA of vLLM itself with every user's adapter loaded."""
    pairs = fleet.bundle.reconstruct(fleet.bundle.users[0]).pairs
    rank = next(size for size in _LORA_RANKS if size >= max(pair.rank for pair in pairs.values()))
    options = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    options += ["--max-cpu-loras", str(len(fleet.bundle.users))]
    leaves = sorted({name.rpartition(".")[2] for name in fleet.bundle.shapes})
    packed = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    targets = sorted({packed.get(leaf, leaf) for leaf in leaves})
    options += ["--lora-target-modules", *targets] if restricted else []
    name = "stock" if restricted else "stock-default"
    system = vllm(stack, folder, fleet, name=name, options=options)
    began = time.perf_counter()
    for place, user in enumerate(fleet.bundle.users):
        body = {"lora_name": user, "lora_path": str(fleet.folders[place % len(fleet.folders)])}
        url = f"{system.endpoint.url}/v1/load_lora_adapter"
        requests.post(url, json=body, timeout=600).raise_for_status()
    click.echo(f"{name}: {len(fleet.bundle.users)} adapters loaded in {time.perf_counter() - began:.0f} s")
    return system


def embedded(
    stack: ExitStack, folder: Path, fleet: served.Served, *, dtype: str = "auto"
) -> dict[str, System]:
    """Our own server, asked for its base model and for the bundle's users."""
    command = [
        sys.executable,
        "-m",
        "soppu.cli",
        "serve",
        "--port",
        "{port}",
        "--model",
        str(fleet.base.path),
    ]
    command += ["--state", str(folder / "state"), "--bundle", str(fleet.path), "--max-batch", "16"]
    command += ["--dtype", dtype]
    port, pid = stack.enter_context(server(folder, "embedded", command, {}))
    endpoint = Endpoint(port, "lorax")
    return {"embedded-base": System(endpoint, pid, False), "embedded": System(endpoint, pid, True)}


def start(
    stack: ExitStack, folder: Path, fleet: served.Served, wanted: Sequence[str], *, slots: int
) -> dict[str, System]:
    """All systems asked for, one after the other."""
    up: dict[str, System] = {}
    for name in ("base", "soppu"):
        if name in wanted:
            up[name] = vllm(stack, folder, fleet, name=name)
    for name in ("stock", "stock-default"):
        if name in wanted:
            up[name] = stock(stack, folder, fleet, slots=slots, restricted=name == "stock")
    if {"embedded", "embedded-base"} & set(wanted):
        up |= embedded(stack, folder, fleet)
    return {name: up[name] for name in SYSTEMS if name in up and name in wanted}


def ask(system: System, users: Sequence[str], turn: Turn, *, seed: int) -> dict[str, Any]:
    """One turn of one system."""
    time.sleep(_SETTLE)
    traffic = Traffic(tuple(users[: turn.users]) if system.adapted else (), turn.zipf)
    wanted = load.asks(traffic, requests=turn.requests, tokens=64, seed=seed)
    return load.measure(system.endpoint, wanted, concurrency=16)


def row(systems: Mapping[str, System], users: Sequence[str], turn: Turn) -> dict[str, Any]:
    """A turn of every system, `turn.repeats` times round; medians, and their ratios to the base."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for repeat in range(turn.repeats):
        for name, system in systems.items():
            runs[name].append(ask(system, users, turn, seed=1000 * turn.users + 2 * repeat + turn.zipf))
    speed = {
        name: statistics.median(run["tokens_per_second"] for run in found) for name, found in runs.items()
    }
    told = ", ".join(f"{name} {value:.0f}" for name, value in speed.items())
    click.echo(f"{turn.users} users, {'zipf' if turn.zipf else 'uniform'}: {told} tokens a second")
    ratios = {name: value / speed["base"] for name, value in speed.items()} if "base" in speed else {}
    memory = {name: system.memory() for name, system in systems.items()}
    return asdict(turn) | {"tokens_per_second": speed, "to_base": ratios, "memory": memory, "runs": runs}


def adapter_bytes(fleet: served.Served) -> dict[str, int]:
    """Of all users in 16-bit numbers: as LoRA pairs, and as cores with their one basis."""
    shapes = fleet.bundle.shapes
    n, sides = len(fleet.bundle.users), sum(o + i for o, i in shapes.values())
    rank, k, numbers = served.RANK, served.RANK, len(shapes) * served.RANK**2
    if fleet.quality:  # beside the study's LoRAs
        rank, k, numbers = personal_ground.RANK, fleet.quality["k"], fleet.quality["numbers"]
    return {"pairs": 2 * n * rank * sides, "cores": 2 * n * numbers, "basis": 2 * k * sides}


@click.command()
@click.option("--users", default=1000, show_default=True, help="Users of the bundle; the largest turn.")
@click.option("--slots", default=16, show_default=True, help="Adapters vLLM's own LoRA keeps resident.")
@click.option("--systems", default=",".join(SYSTEMS), show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Of the largest turn; others are made once.")
@click.option("--requests", "count", default=64, show_default=True, help="Of the largest turn; else half.")
@click.option("--turns", type=click.Choice(["all", "largest"]), default="all", show_default=True)
@click.option("--shape", type=click.Choice(list(served.FORMS)), default="qv30", show_default=True)
@click.option("--method", type=click.Choice(served.METHODS), default="cores", show_default=True)
@click.option("--result", default="serve", show_default=True, help="Name of the result file.")
def main(
    *,
    users: int,
    slots: int,
    systems: str,
    repeats: int,
    count: int,
    turns: str,
    shape: str,
    method: str,
    result: str,
) -> None:
    """Start the servers, measure in turns, write the result file; rows of other bundles and turns stay."""
    if (shape, method) in (("pipeline", "cores"), ("qv30", "study")):
        raise click.UsageError("--method cores: of --shape qv30 alone; study: of --shape pipeline alone")
    sizes = [n for n in (1, 16, 64, 256) if n < users] if turns == "all" else []
    plans = [Turn(users, False, count, repeats)]
    plans += [Turn(n, zipf, count // 2, 1) for n in sizes for zipf in (False, True)]
    plans += [Turn(users, True, count // 2, 1)] if turns == "all" else []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        kind = served.Kind(shape, method)
        fleet = served.write(folder, users=users, folders=min(FOLDERS, users), kind=kind)
        up = start(stack, folder, fleet, systems.split(","), slots=slots)
        for system in up.values():
            ask(system, fleet.bundle.users, Turn(users, False, _WARM, 1), seed=1)
        for name in up.keys() & {"soppu", "embedded"}:
            click.echo(f"{name}: {in_memory(up[name], len(fleet.bundle.users))} users in memory")
        rows = [row(up, fleet.bundle.users, plans[0])]
        quicker = {name: system for name, system in up.items() if name != "stock-default"}
        rows += [row(quicker, fleet.bundle.users, plan) for plan in plans[1:]]
        told = asdict(kind) | {"turns": turns} | described(fleet, kind)
    made = circumstances(seed=0) | {
        "what": "multi-adapter serving: 16 requests under way, 64 new tokens each, prompts of about 32",
        "model": "SmolLM2-135M",
        "adapters": {"modules": "q_proj, v_proj of 30 layers", "rank": served.RANK, "slots": slots},
        "adapter_bytes": told["adapter_bytes"],
        "vllm": {"version": _vllm_version(), "options": list(COMMON)},
    }
    held = read_result(result) or {}
    click.echo(f"written: {store(result, merged(held, made, [told | row for row in rows]))}")


def in_memory(system: System, users: int) -> int:
    """How many users a server has read, once that are all, or some minutes have passed."""
    end = time.monotonic() + _AHEAD
    while True:
        told = figures(system.endpoint.url)
        found = int(sum(value for name, value in told.items() if name.startswith("soppu_resident_users{")))
        if found >= users or time.monotonic() > end:
            return found
        time.sleep(_SETTLE)


def described(fleet: served.Served, kind: served.Kind) -> dict[str, Any]:
    """What a row says of the bundle: bytes, and users' relative errors where anything was compressed."""
    errors = sorted(fleet.bundle.report.relative_error.values())
    told = {"median": statistics.median(errors), "worst": errors[-1]}
    return {
        "bundle_bytes": fleet.path.stat().st_size,
        "relative_error": None if kind.method == "cores" else told,
        "adapter_bytes": adapter_bytes(fleet),
        **({"quality": dict(fleet.quality)} if fleet.quality else {}),
    }


def merged(held: Mapping[str, Any], made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A result file with these rows in the place of those of their kind.

    Its head tells of the rows of all turns of the first kind, so only a run of these writes another.
    """
    mine = {kind_of(row) for row in rows}
    rows = [row | {"commit": made["commit"]} for row in rows]
    others = [row for row in held.get("rows", []) if kind_of(row) not in mine]
    whole = made if FIRST in mine or not others else held
    return {**whole, "rows": sorted(others + rows, key=lambda row: kind_of(row) != FIRST)}


def kind_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Shape, method and turns of a row; rows of before there were several say nothing."""
    return row.get("shape", "qv30"), row.get("method", "cores"), row.get("turns", "all")


def _vllm_version() -> str:
    found = sorted(PYTHON.parents[1].glob("lib/python3*/site-packages/vllm_cpu-*.dist-info"))
    return found[0].name.removesuffix(".dist-info") if found else "not installed"


if __name__ == "__main__":
    main()
