"""Peak memory of compressing a fleet that lies on disk, by its size: benchmarks/results/streaming.json.

    python -m benchmarks.streaming [--method joint]

Writes n PEFT folders of a synthetic fleet, then compresses them in a process of its own that reads one
batch of adapters at a time, for n = 500 and n = 2000, and compares the largest resident sizes the system
saw.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks import fleets
from benchmarks.record import ROOT, circumstances, store
from benchmarks.rivals import Folders
from soppu.compress import CompressOptions, compress
from soppu.compress.options import ratio

# 500 users have more than is kept between passes (`soppu.compress.fleet.passes.ROOM`)
SHAPES = {f"layers.0.{name}": (4096, 4096) for name in ("k_proj", "o_proj", "q_proj")}
SIZES = (500, 2000)
METHODS: dict[str, dict[str, Any]] = {
    "joint": {"rank": 16},
    "residual": {"rank": 64, "ratio": 32.0},
}


def measured(folder: Path, n: int, method: str) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.streaming",
        "child",
        str(folder),
        "--n",
        str(n),
        "--method",
        method,
    ]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(told.stdout.splitlines()[-1]))


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Default: all.")
def main(context: click.Context, methods: tuple[str, ...]) -> None:
    """Write the fleet, measure every method at every size, write the result file."""
    if context.invoked_subcommand:
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fleets.write(fleets.FleetSpec(n=max(SIZES), shapes=SHAPES), folder)
        for method in methods or METHODS:
            for n in SIZES:
                rows.append(measured(folder, n, method))
                click.echo(json.dumps(rows[-1]))
    what = {"what": "peak resident memory of compressing n adapters from disk", "shapes": SHAPES, "r": 16}
    click.echo(f"written: {store('streaming', circumstances(seed=0) | what | {'rows': rows})}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--n", type=int, required=True)
@click.option("--method", required=True)
def child(folder: Path, n: int, method: str) -> None:
    """Compress the first n folders, and say what it took, in one line of JSON."""
    paths = {path.name: path for path in sorted(folder.iterdir())[:n]}
    before = _peak()
    started = time.perf_counter()
    bundle = compress(Folders(paths), CompressOptions(method=method, device="cpu", **METHODS[method]))
    data = bundle.to_bytes()
    row = {
        "n": n,
        "method": method,
        "settings": METHODS[method],
        "peak_bytes": _peak(),
        "peak_bytes_before": before,
        "seconds": time.perf_counter() - started,
        "error": bundle.report.relative_error_rms,
        "ratio": ratio(bundle.report.parameters_before, len(data)),
        "bytes_read_once": sum(file.stat().st_size for path in paths.values() for file in path.iterdir()),
    }
    click.echo(json.dumps(row))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
