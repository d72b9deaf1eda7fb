"""Relative error at equal bytes, every method and the public packages: benchmarks/results/compression.json.

    python -m benchmarks.compression gpt2                 # three real adapters
    python -m benchmarks.compression synthetic --n 100    # a fleet with published statistics; also 500, 2000
    python -m benchmarks.compression page                 # docs/compression.md's tables and plots from the
    results

Bytes are those of the file with everything in it, the ratio is against adapters at 16 bits a number. Every
method may use its best settings at each size: joint methods every width below. A package is measured over
its settings once, and at each size its best point that is no larger counts. Each call replaces its own
section of the file.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import fleets, rivals
from benchmarks.compression_page import write_page
from benchmarks.record import RESULTS, circumstances, store
from soppu.adapter import LoraAdapter
from soppu.compress import CompressOptions, compress
from soppu.compress.target import ratio
from soppu.errors import SoppuError

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_WIDTHS = ((8, 8), (6, 6), (4, 4))
_CLUSTERS = (2, 4)
_MANY = 100  # from more users on, joint methods are tried at one width and two clusters
_RANK = 128
SYNTHETIC_SHAPES = {"layers.0.q_proj": (768, 768), "layers.0.v_proj": (256, 768)}
_RIVALS_UP_TO = 100


def settings(method: str, n: int) -> Iterator[dict[str, Any]]:
    """What a method is tried with at every size; the best one counts."""
    if method in ("joint", "joint-diag", "cluster"):
        for basis_bits, core_bits in _WIDTHS if n <= _MANY and method == "joint" else _WIDTHS[1:2]:
            base = {"rank": _RANK, "basis_bits": basis_bits, "core_bits": core_bits}
            if method == "cluster":
                yield from (base | {"clusters": c} for c in _CLUSTERS[: 2 if n <= _MANY else 1] if c < n)
            else:
                yield base
    else:
        yield {"rank": 64} if method == "residual" else {}


def best(adapters: Mapping[str, LoraAdapter], method: str, allowed: int) -> dict[str, Any] | None:
    """The least root-mean-square error a method reaches in so many bytes; None where it cannot."""
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for kwargs in settings(method, len(adapters)):
        try:
            bundle = compress(
                adapters, CompressOptions(method=method, max_bytes=allowed, device="cpu", **kwargs)
            )
        except SoppuError:
            continue
        size, report = len(bundle.to_bytes()), bundle.report
        found.append(
            {
                "bytes": size,
                "ratio": ratio(report.parameters_before, size),
                "error": report.relative_error_rms,
                "worst": report.relative_error_max,
                "seconds": report.seconds,
                "settings": kwargs | {"clusters": report.clusters},
                "k": max(report.k_used.values()),
            }
        )
    if not found:
        return None
    chosen = min(found, key=lambda row: row["error"])
    return chosen | {"tried": len(found), "seconds_all": time.perf_counter() - started}


def table(
    adapters: Mapping[str, LoraAdapter], methods: tuple[str, ...], ratios: tuple[float, ...]
) -> list[dict[str, Any]]:
    """One row for each method and ratio."""
    parameters = sum(adapter.parameters() for adapter in adapters.values())
    rows = []
    for wanted in ratios:
        allowed = int(2 * parameters / wanted)
        for method in methods:
            made = best(adapters, method, allowed)
            rows.append({"method": method, "wanted": wanted, "allowed": allowed} | (made or {"error": None}))
            told = "out of reach" if made is None else f"error {made['error']:.4f} at {made['ratio']:.2f}x"
            click.echo(f"{wanted:5g}x {method:10s} {told}")
    return rows


def packages(folders: Mapping[str, Path], originals: Mapping[str, LoraAdapter]) -> dict[str, Any]:
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
@click.option("--methods", default="residual,svd,joint,joint-diag,cluster,ternary", show_default=True)
def gpt2(adapters: Path | None, methods: str) -> None:
    """Three adapters that people trained on GPT-2."""
    folders = fleets.gpt2_folders(adapters)
    held = fleets.gpt2(adapters)
    rows = table(held, tuple(methods.split(",")), RATIOS)
    _keep("gpt2", {"n": len(held), "rows": rows, "packages": packages(folders, held)})


@main.command()
@click.option("--n", type=int, default=100, show_default=True, help="Users.")
@click.option("--methods", default="residual,svd,joint,joint-diag,cluster,ternary", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def synthetic(n: int, methods: str, seed: int) -> None:
    """A fleet with the statistics of a large public collection."""
    spec = fleets.FleetSpec(n=n, shapes=SYNTHETIC_SHAPES, seed=seed)
    fleet = fleets.Fleet(spec)
    held = {user: fleet[user] for user in fleet}
    found: dict[str, Any] = {"n": n, "shapes": SYNTHETIC_SHAPES, "r": spec.r, "p_seed": spec.p_seed}
    found["rows"] = table(held, tuple(methods.split(",")), RATIOS[1:])
    if n <= _RIVALS_UP_TO:
        with tempfile.TemporaryDirectory() as folder:
            found["packages"] = packages(fleets.write(spec, Path(folder)), held)
    _keep(f"synthetic-{n}", found)


@main.command()
def page() -> None:
    """Write the tables and plots of docs/compression.md from the result files."""
    click.echo(f"written: {write_page()}")


def _keep(section: str, values: dict[str, Any]) -> None:
    path = RESULTS / "compression.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    click.echo(f"written: {store('compression', held | {section: circumstances(seed=0) | values})}")


if __name__ == "__main__":
    main()
