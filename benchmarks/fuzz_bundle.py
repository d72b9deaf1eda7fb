"""Fuzzes the reader of bundle files: whatever the bytes, a bundle comes out or `BundleError`.

    python -m benchmarks.fuzz_bundle --minutes 3 --seed 0

Starts from small sound files of every kind and changes them at every depth
(`benchmarks.mutate`). What is read must be written, read again and reconstructed as well. Any other exception
is a failure, and so is any input that takes far more memory than its size explains. Its bytes are saved; the
counts go to benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from soppu.compress import Bundle
from soppu.errors import BundleError
from tests.soppu.compress import handmade, mutate

STORED = record.ROOT / "tests" / "soppu" / "compress" / "data" / "format_2.json"
_FREE_MEMORY = 64 << 20  # bytes a reader may take for any file, and for each byte of the file:
_MEMORY_A_BYTE = 1000
_SLOW = 5.0  # seconds for one input


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0


def seeds() -> dict[str, bytes]:
    """Sound files of every kind, by name."""
    made = {name: handmade.make(plan).to_bytes() for name, plan in handmade.PLANS.items()}
    stored = json.loads(STORED.read_text())
    return made | {f"stored, {name}": base64.b64decode(one["file"]) for name, one in stored.items()}


def attempt(data: bytes) -> str:
    """Read a file as its users would. Returns why it was refused, "" if it was not; raises other faults."""
    try:
        bundle = Bundle.from_bytes(data, source="fuzz")
    except BundleError as error:
        return str(error)
    again = Bundle.from_bytes(bundle.to_bytes())
    assert again.users == bundle.users
    if sum(map(sum, bundle.shapes.values())) < 1 << 20:  # a module may be as large as it says it is
        for user in bundle.users:
            before, after = bundle.reconstruct(user), again.reconstruct(user)
            for name, pair in before.pairs.items():
                assert torch.equal(pair.A, after.pairs[name].A) and torch.equal(pair.B, after.pairs[name].B)
                assert bool(torch.isfinite(pair.A).all()) and bool(torch.isfinite(pair.B).all())
    return ""


def fuzz(minutes: float, *, seed: int, folder: Path) -> Tally:
    """Change and read files until the time is up."""
    rng, tally, files = random.Random(seed), Tally(), seeds()
    names = list(files)
    for data in files.values():
        assert attempt(data) == ""
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        kind = rng.choice(list(mutate.KINDS)) if rng.random() < 0.9 else "tensor"
        _one(kind, mutate.KINDS[kind](files[rng.choice(names)], rng), tally, folder)
    return tally


def _one(kind: str, data: bytes, tally: Tally, folder: Path) -> None:
    before, started = _peak(), time.monotonic()
    tally.inputs[kind] += 1
    try:
        refusal = attempt(data)
    except Exception:
        _fail(tally, data, kind, traceback.format_exc(), folder)
        return
    taken, seconds = _peak() - before, time.monotonic() - started
    tally.slowest = max(tally.slowest, seconds)
    if taken > _FREE_MEMORY + _MEMORY_A_BYTE * len(data) or seconds > _SLOW:
        _fail(tally, data, kind, f"{taken} bytes more, {seconds:.1f} s; refused: {refusal}", folder)
    if refusal:
        tally.refusals[_reason(refusal)] += 1
    else:
        tally.accepted[kind] += 1


def _fail(tally: Tally, data: bytes, kind: str, fault: str, folder: Path) -> None:
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.bundle"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    tally.failures.append({"kind": kind, "file": path.name, "fault": fault})
    print(f"{kind}: {path}\n{fault}", flush=True)


def _reason(refusal: str) -> str:
    """A message without what differs from input to input."""
    words = refusal.removeprefix("fuzz: ").split()
    return " ".join("#" if any(letter.isdigit() for letter in word) else word[:20] for word in words[:8])


def _peak() -> int:
    """Most bytes of memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Run, store what was found, and tell whether anything was."""
    parser = argparse.ArgumentParser(description="Fuzzes the reader of bundle files.")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=record.RESULTS / "fuzz_failures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = _peak()
    tally = fuzz(options.minutes, seed=options.seed, folder=options.failures)
    values = record.circumstances(seed=options.seed, packages=("torch", "numpy", "safetensors")) | {
        "minutes": options.minutes,
        "inputs": sum(tally.inputs.values()),
        "accepted": sum(tally.accepted.values()),
        "refused": sum(tally.refusals.values()),
        "other_exceptions_or_excess": len(tally.failures),
        "failures": tally.failures,
        "peak_memory_growth_bytes": _peak() - before,
        "slowest_seconds": round(tally.slowest, 3),
        "inputs_by_kind": dict(tally.inputs),
        "accepted_by_kind": dict(tally.accepted),
        "different_reasons": len(tally.refusals),
        "most_common_reasons": dict(tally.refusals.most_common(40)),
    }
    path = record.store("fuzz", values)
    shown = {key: values[key] for key in ("inputs", "accepted", "refused", "other_exceptions_or_excess")}
    print(f"{path}: {shown}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
