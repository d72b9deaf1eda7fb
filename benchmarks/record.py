"""What every result file says of the circumstances it was measured in, and how it is written."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from soppu.evaluate.report import describe_hardware, utc_now
from soppu.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft")


def circumstances(*, seed: int, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Hardware, versions, seed, commit, time."""
    return {
        "hardware": describe_hardware(),
        "cpu": cpu_name(),
        "gpu": "not measured",
        "versions": {name: _version(name) for name in packages},
        "seed": seed,
        "commit": commit(),
        "created": utc_now(),
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return lines[0].split(":", 1)[1].strip() if lines else "unknown"


def commit() -> str:
    """The commit checked out, marked where the tree differs from it in more than results."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    told = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def store(name: str, values: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json, atomically."""
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps(values, indent=1) + "\n")
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
