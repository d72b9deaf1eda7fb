"""Turns the report of a demo run into the figures the README quotes: benchmarks/results/demo.json.

    make bench          # runs the demo, then this
    python -m benchmarks.demo [RUN_DIR]

Measures nothing itself. It adds what a figure needs to mean something: hardware, versions, seed and commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soppu.evaluate.report import read
from soppu.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
PACKAGES = ("torch", "transformers", "peft", "flwr", "prefect", "ray")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The report's figures with the circumstances they were measured in."""
    cores = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "what": "make demo (configs/demo.toml), one run",
        "hardware": report["hardware"],
        "cpu": cores[0].split(":", 1)[1].strip() if cores else "unknown",
        "versions": {name: version(name) for name in PACKAGES},
        "seed": report["seed"],
        "commit": _commit(),
        "run": report["run"],
        "created": report["created"],
        "users": [{k: v for k, v in user.items() if k != "relative_error"} for user in report["users"]],
        "align": report["align"],
        "federation": {k: report["federation"][k] for k in ("rounds", "bytes_up", "bytes_down", "seconds")},
        "compression": {
            key: report["compression"][key]
            for key in (
                "k",
                "dtype",
                "bytes_before",
                "bytes_after",
                "ratio",
                "parameters_before",
                "parameters_after",
                "relative_error",
                "lower_bound",
            )
        },
        "gate": report["gate"],
        "stages": report["stages"],
    }


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def main() -> None:
    """Read the run's report, write the result file."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "latest")
    write_text(RESULT, json.dumps(figures(read(folder / "report.json")), indent=2) + "\n")
    print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
