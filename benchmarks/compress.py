"""Compression times side by side in one run, on one fleet: benchmarks/results/compress.json.

    OMP_NUM_THREADS=2 python -m benchmarks.compress [--users 100]

The dense iteration as earlier public code makes it (B A formed for every adapter, 100 iterations: one is
measured and multiplied), the two public packages, and ours, from PEFT folders on disk to a file on disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import fleets, joint_speed, rivals
from benchmarks.record import circumstances, store
from soppu.compress import CompressOptions, compress

K = 16
OURS = {
    "joint": CompressOptions(method="joint", rank=K, device="cpu"),
    "residual": CompressOptions(ratio=16.0, device="cpu"),
}


def ours(folders: Mapping[str, Path], target: Path) -> dict[str, Any]:
    """Seconds of each of our methods, errors beside them."""
    found = {}
    for name, options in OURS.items():
        started = time.perf_counter()
        bundle = compress(rivals.Folders(folders), options)
        bundle.save(target / name)
        seconds = time.perf_counter() - started
        size = (target / name).stat().st_size
        found[name] = {"seconds": seconds, "error": bundle.report.relative_error_rms, "bytes": size}
    return found


def packages(folders: Mapping[str, Path], workdir: Path) -> dict[str, Any]:
    """Seconds of the public packages at the same number of components."""
    made = {}
    for package in rivals.PACKAGES:
        cost = rivals.compress(package, folders, rivals.Setting(K), workdir / package)
        made[package] = {
            "seconds": cost.seconds,
            "processor_seconds": cost.cpu_seconds,
            "threads": cost.threads,
        }
    return made


def dense(side: int, users: int) -> dict[str, Any]:
    """What 100 dense iterations of all adapters of one module would take, from a few that are made."""
    outs, ins = joint_speed.load(4, side, 16, 0)
    one = joint_speed.dense(outs, ins, K, adapters=2, repeats=3, seed=0)
    whole = one["seconds"] * users * joint_speed.REFERENCE_ITERATIONS
    return {"seconds_an_adapter_iteration": one["seconds"], "seconds": whole}


@click.command()
@click.option("--users", default=100, show_default=True)
def main(users: int) -> None:
    """Measure and write the result file."""
    spec = fleets.FleetSpec(n=users)
    with tempfile.TemporaryDirectory() as name:
        folders = fleets.write(spec, Path(name) / "fleet")
        found: dict[str, Any] = ours(folders, Path(name))
        found |= packages(folders, Path(name) / "work")
    made = dense(1024, users)
    found["dense, 100 iterations"] = made | {"seconds": made["seconds"] * len(spec.shapes)}
    for row in found.values():
        row["times_joint"] = row["seconds"] / found["joint"]["seconds"]
    what = {
        "what": "seconds to compress one fleet",
        "n": users,
        "r": spec.r,
        "k": K,
        "shapes": dict(spec.shapes),
    }
    more = {"threads": torch.get_num_threads(), "methods": found}
    click.echo(f"written: {store('compress', circumstances(seed=0) | what | more)}")


if __name__ == "__main__":
    main()
