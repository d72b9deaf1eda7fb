"""From disk to adapters ready to serve, for one user and a thousand: benchmarks/results/cold_start.json.

    python -m benchmarks.cold_start [--users 1000]

Three forms of the same adapters: PEFT folders as they are (float32), a ternary bundle, and a bundle of the
default method. Timed are reading (the system's cache of the files is dropped before each run), decoding,
and the tensors in the type and place the server computes in. Medians of several runs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import fleets
from benchmarks.record import circumstances, store
from soppu import adapter as peft
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle, CompressOptions, compress
from soppu.serve.bank.from_bundle import read

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (o, 576)
    for layer in range(4)
    for name, o in (("q_proj", 576), ("v_proj", 192))
}
FORMS: Mapping[str, CompressOptions] = {
    "ternary": CompressOptions(method="ternary", density=0.1, device="cpu"),
    "residual": CompressOptions(ratio=16.0, device="cpu"),
}
_RUNS = 5


def cast(name: str, tensor: Tensor) -> Tensor:
    """What the server does to a tensor of a float32 model on the CPU."""
    return tensor.to(torch.float32).contiguous()


def folders_ready(folders: list[Path]) -> int:
    """Adapters read from PEFT folders and cast; gives how many tensors are ready."""
    ready = []
    for folder in folders:
        held = peft.read(folder)
        ready.append({name: (cast(name, pair.A), cast(name, pair.B)) for name, pair in held.pairs.items()})
    return sum(len(pairs) for pairs in ready)


def bundle_ready(path: Path) -> int:
    """All users of a bundle file in the form the server holds them."""
    return len(read(Bundle.load(path), cast=cast))


def timed(work: Callable[[], object], files: list[Path]) -> dict[str, Any]:
    """Median seconds of `work` with none of its files in the system's cache."""
    seconds = []
    for _ in range(_RUNS):
        _drop(files)
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in files)
    return {"seconds": statistics.median(seconds), "runs": seconds, "bytes": size}


def measure(adapters: Mapping[str, LoraAdapter], folder: Path) -> dict[str, Any]:
    """One row for each form of these adapters."""
    paths = []
    for user, held in adapters.items():
        peft.write(held, folder / "peft" / user)
        paths.append(folder / "peft" / user)
    files = [file for path in paths for file in path.iterdir()]
    rows = {"uncompressed": timed(lambda: folders_ready(paths), files)}
    for form, options in FORMS.items():
        path = folder / f"{form}.soppu"
        bundle = compress(adapters, options)
        bundle.save(path)
        rows[form] = timed(lambda path=path: bundle_ready(path), [path])  # type: ignore[misc]
        rows[form] |= {"error": bundle.report.relative_error_rms}
    for row in rows.values():
        row["times_faster"] = rows["uncompressed"]["seconds"] / row["seconds"]
    return rows


def _drop(files: list[Path]) -> None:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@click.command()
@click.option("--users", default=1000, show_default=True, help="Users of the larger fleet.")
def main(users: int) -> None:
    """Measure one user and many, write the result file."""
    found: dict[str, Any] = {}
    for n in (1, users):
        fleet = fleets.Fleet(fleets.FleetSpec(n=n, r=8, shapes=SHAPES))
        with tempfile.TemporaryDirectory() as folder:
            found[str(n)] = measure({user: fleet[user] for user in fleet}, Path(folder))
        for form, row in found[str(n)].items():
            click.echo(f"{n:5d} {form:13s} {row['seconds'] * 1e3:9.1f} ms {row['bytes']:12,} bytes")
    what = {"what": "disk to ready to serve, CPU, float32", "shapes": SHAPES, "r": 8}
    click.echo(f"written: {store('cold_start', circumstances(seed=0) | what | {'users': found})}")


if __name__ == "__main__":
    main()
