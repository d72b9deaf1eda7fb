"""Measures the ternary method: benchmarks/results/ternary.json.

    python -m benchmarks.ternary                      # the coder, on one core
    python -m benchmarks.ternary FOLDER [FOLDER ...]  # and what ternary forms leave of these PEFT adapters

The coder section needs the package zstandard, which it stands beside; SOPPU itself does not. A run keeps the
sections of the result file that it does not measure.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from soppu import adapter as adapters
from soppu.compress.codec import golomb
from soppu.compress.numbers import ternary
from tests.soppu.compress import ternary_measures as measures

RESULT = record.RESULTS / "ternary.json"
PACKAGES = ("numpy", "torch", "zstandard")
SEED = 0
VALUES = 50_000_000
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
REPEATS = 3
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0)

T = TypeVar("T")


def coder() -> list[dict[str, Any]]:
    """Size and speed of the bitstream and of zstd -3 on the same int8 array, at every density."""
    compress, decompress = _zstd()
    rows = []
    for density in DENSITIES:
        values = _draw(density)
        ours = _measured(golomb.encode, lambda data: golomb.decode(data, size=VALUES, source="bench"), values)
        theirs = _measured(compress, lambda data: np.frombuffer(decompress(data), np.int8), values)
        entropy = measures.entropy(np.count_nonzero(values) / VALUES)
        rows.append(
            {
                "density": density,
                "values": VALUES,
                "entropy_bits": entropy,
                "published_bits": golomb.bits_per_value(density),
                "above_entropy": ours["bits"] / entropy - 1,
                "golomb": ours,
                "rice_bits": 8 * len(measures.rice(values)) / VALUES,
                "zstd_3": theirs,
                "times_smaller_than_zstd": theirs["bits"] / ours["bits"],
            }
        )
        print(_line(rows[-1]))
    return rows


def errors(folder: Path) -> list[dict[str, Any]]:
    """Relative error of D that the ternary forms leave of one adapter; the faithful one at its best alpha."""
    given, rows = adapters.read(folder), []
    for density in DENSITIES:
        released = ternary.faithful(given, density=density, alpha=1.0)
        left = {
            alpha: measures.relative_error(given, measures.scaled(released, alpha**2)) for alpha in ALPHAS
        }
        best = min(ALPHAS, key=lambda alpha: left[alpha])
        made = ternary.fixed(given, density=density)
        rows.append(
            {
                "density": density,
                "fixed": measures.relative_error(given, made),
                "faithful": left[best],
                "alpha": best,
                "faithful_share_of_B_kept": _share_of_b(released),
            }
        )
        print(f"{folder.name:>14} {density:5.0%}  fixed {rows[-1]['fixed']:.3f}  faithful {left[best]:.3f}")
    return rows


def circumstances() -> dict[str, Any]:
    """What a figure needs to mean something; other programs on the machine make every speed here smaller."""
    found = record.circumstances(seed=SEED, packages=PACKAGES)
    return found | {"cores_used": 1, "load_average": round(os.getloadavg()[0], 2)}


def _draw(density: float) -> NDArray[np.int8]:
    rng = np.random.default_rng(SEED)
    values = (rng.random(VALUES, dtype=np.float32) < density).astype(np.int8)
    values[rng.random(VALUES, dtype=np.float32) < 0.5] *= -1
    return values


def _measured(
    encode: Callable[[NDArray[np.int8]], bytes],
    decode: Callable[[bytes], NDArray[np.int8]],
    values: NDArray[np.int8],
) -> dict[str, float]:
    packing, data = _best(lambda: encode(values))
    unpacking, made = _best(lambda: decode(data))
    if not np.array_equal(made, values):
        raise SystemExit("what was decoded is not what was encoded")
    return {
        "bits": 8 * len(data) / values.size,
        "encode_values_per_second": values.size / packing,
        "decode_values_per_second": values.size / unpacking,
    }


def _best(call: Callable[[], T]) -> tuple[float, T]:
    """The shortest of some runs in seconds, and what the call gives."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        made = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), made


def _zstd() -> tuple[Callable[[NDArray[np.int8]], bytes], Callable[[bytes], bytes]]:
    try:
        import zstandard
    except ImportError:
        raise SystemExit(
            "benchmarks.ternary compares with zstd: pip install zstandard (SOPPU does not need it)"
        ) from None
    packer, reader = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    return lambda values: packer.compress(values.data), reader.decompress


def _share_of_b(made: dict[str, ternary.Ternary]) -> float:
    sides = [part.B for part in made.values()]
    return sum(int(side.count_nonzero()) for side in sides) / sum(side.numel() for side in sides)


def _line(row: dict[str, Any]) -> str:
    parts = [f"density {row['density']:4.0%}  entropy {row['entropy_bits']:.4f} bits"]
    for name in ("golomb", "zstd_3"):
        found = row[name]
        speeds = [found[f"{way}_values_per_second"] / 1e6 for way in ("encode", "decode")]
        parts.append(f"{name} {found['bits']:.4f} bits, {speeds[0]:.0f} / {speeds[1]:.0f} million a second")
    return "  ".join(parts)


def main() -> None:
    """Measure on one core, and write the result file."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    sections: dict[str, Any] = {"coder": {"circumstances": circumstances(), "rows": coder()}}
    if folders := [Path(name) for name in sys.argv[1:]]:
        rows = {folder.name: errors(folder) for folder in folders}
        sections["errors"] = {"circumstances": circumstances(), "adapters": rows}
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    print(f"written: {record.store('ternary', before | sections)}")


if __name__ == "__main__":
    main()
