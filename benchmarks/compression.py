"""Relative error at equal bytes, every method and the public packages: benchmarks/results/compression.json.

    python -m benchmarks.compression gpt2                 # three real adapters
    python -m benchmarks.compression synthetic --n 100    # a fleet with published statistics; also 500, 2000
    python -m benchmarks.compression page                 # docs/compression.md's tables and plots from the
    results

Bytes are those of the file with everything in it, the ratio is against adapters at 16 bits a number. Every
method may use its best settings at each size: joint methods every width below. A package is measured over
its settings once, and at each size its best point that is no larger counts. What a call measures is kept
method by method, beside the methods that it was not asked for; each row names its commit.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import fleets, rivals
from benchmarks.compression_page import write_page
from benchmarks.record import RESULTS, circumstances, commit, store
from soppu.adapter import LoraAdapter
from soppu.compress import CompressOptions, compress
from soppu.compress.methods.plan import RANKS
from soppu.compress.options import ratio
from soppu.config import METHODS, SHARED_METHODS
from soppu.errors import BundleError

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_WIDTHS = ((8, 8), (6, 6), (4, 4))
_CLUSTERS = (2, 4)
_MANY = 100  # from more users on, joint methods are tried at one width and two clusters
_RANKS = (1, *(k for k in RANKS[1:] if k <= 128))
SYNTHETIC_SHAPES = {"layers.0.q_proj": (768, 768), "layers.0.v_proj": (256, 768)}

Adapters = Mapping[str, LoraAdapter]
Row = dict[str, Any]


def settings(method: str, n: int) -> Iterator[dict[str, Any]]:
    """What a method is tried with; the best one counts. Shared bases are tried at every rank."""
    if method not in SHARED_METHODS:
        yield {"rank": 64} if method == "residual" else {}
        return
    for basis_bits, core_bits in _WIDTHS if n <= _MANY and method == "joint" else _WIDTHS[1:2]:
        for rank in _RANKS:
            base = {"rank": rank, "basis_bits": basis_bits, "core_bits": core_bits}
            counts = _CLUSTERS[: 2 if n <= _MANY else 1] if method == "cluster" else (1,)
            yield from (base | {"clusters": c} for c in counts if c == 1 or c < n)


def point(adapters: Adapters, method: str, kwargs: dict[str, Any]) -> Row | None:
    """One compression; None where the target is out of reach."""
    try:
        bundle = compress(adapters, CompressOptions(method=method, device="cpu", **kwargs))
    except BundleError:
        return None
    size, report = len(bundle.to_bytes()), bundle.report
    return {
        "bytes": size,
        "ratio": ratio(report.parameters_before, size),
        "error": report.relative_error_rms,
        "worst": report.relative_error_max,
        "seconds": report.seconds,
        "settings": {name: value for name, value in kwargs.items() if name != "max_bytes"},
        "k": max(report.k_used.values()),
    }


def points(adapters: Adapters, method: str, allowed: Sequence[int]) -> list[Row]:
    """What a method makes of a fleet: shared bases of every rank, or a file of each of the sizes allowed."""
    tried = [
        kwargs | more
        for kwargs in settings(method, len(adapters))
        for more in ([{}] if method in SHARED_METHODS else [{"max_bytes": size} for size in allowed])
    ]
    return [made for kwargs in tried if (made := point(adapters, method, kwargs)) is not None]


def table(adapters: Adapters, methods: tuple[str, ...], ratios: tuple[float, ...]) -> list[Row]:
    """One row for each method and ratio: the least error in so many bytes; None where a method cannot."""
    parameters = sum(adapter.parameters() for adapter in adapters.values())
    allowed = [int(2 * parameters / wanted) for wanted in ratios]
    rows = []
    for method in methods:
        started, found = time.perf_counter(), points(adapters, method, allowed)
        for wanted, size in zip(ratios, allowed, strict=True):
            fitting = [row for row in found if row["bytes"] <= size]
            made = min(fitting, key=lambda row: row["error"]) if fitting else {"error": None}
            rows.append({"method": method, "wanted": wanted, "allowed": size} | made)
            told = f"error {made['error']:.4f} at {made['ratio']:.2f}x" if fitting else "out of reach"
            click.echo(f"{wanted:5g}x {method:10s} {told}")
        click.echo(f"{method}: {len(found)} points, {time.perf_counter() - started:.0f} s")
    return rows


def packages(folders: Mapping[str, Path], originals: Adapters) -> dict[str, Any]:
    """Curves of the public packages over their settings."""
    made = {}
    for package in rivals.PACKAGES:
        with tempfile.TemporaryDirectory() as workdir:
            made[package] = [asdict(point) for point in rivals.curve(package, folders, Path(workdir))]
        click.echo(f"{package}: {len(made[package])} settings")
    return made


@click.group()
def main() -> None:
    """Measure compression, one fleet at a time."""


@main.command()
@click.option("--adapters", type=click.Path(exists=True, path_type=Path), help="Folder with the adapters.")
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--packages/--no-packages", "others", default=True, help="Measure the public packages too.")
def gpt2(adapters: Path | None, methods: str, others: bool) -> None:
    """Three adapters that people trained on GPT-2."""
    folders = fleets.gpt2_folders(adapters)
    held = fleets.gpt2(adapters)
    _measure("gpt2", held, methods, ratios=RATIOS, about={"n": len(held)})
    if others:
        _keep("gpt2", {"packages": packages(folders, held)})


@main.command()
@click.option("--n", type=int, default=100, show_default=True, help="Users.")
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--packages/--no-packages", "others", default=True, help="Measure the public packages too.")
@click.option("--seed", type=int, default=0, show_default=True)
def synthetic(n: int, methods: str, others: bool, seed: int) -> None:
    """A fleet with the statistics of a large public collection."""
    spec = fleets.FleetSpec(n=n, shapes=SYNTHETIC_SHAPES, seed=seed)
    fleet = fleets.Fleet(spec)
    held = {user: fleet[user] for user in fleet}
    about = {"n": n, "shapes": SYNTHETIC_SHAPES, "r": spec.r, "p_seed": spec.p_seed}
    _measure(f"synthetic-{n}", held, methods, ratios=RATIOS[1:], about=about)
    if others:
        with tempfile.TemporaryDirectory() as folder:
            _keep(f"synthetic-{n}", {"packages": packages(fleets.write(spec, Path(folder)), held)})


@main.command()
def page() -> None:
    """Write the tables and plots of docs/compression.md from the result files."""
    click.echo(f"written: {write_page()}")


def _measure(
    section: str, held: Adapters, methods: str, *, ratios: tuple[float, ...], about: dict[str, Any]
) -> None:
    """Measure one method after the other, and keep each as soon as it is there."""
    for method in filter(None, methods.split(",")):
        measured = [row | {"commit": commit()} for row in table(held, (method,), ratios)]
        kept = [row for row in _read().get(section, {}).get("rows", []) if row["method"] != method]
        rows = sorted(kept + measured, key=lambda row: (METHODS.index(row["method"]), row["wanted"]))
        _keep(section, about | {"rows": rows})


def _read() -> dict[str, Any]:
    path = RESULTS / "compression.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _keep(section: str, values: dict[str, Any]) -> None:
    held = _read()
    made = held.get(section, {}) | circumstances(seed=0) | values
    click.echo(f"written: {store('compression', held | {section: made})}")


if __name__ == "__main__":
    main()
