"""Turns the report of a demo run into the figures the README quotes: benchmarks/results/demo.json.

    make bench          # runs the demo, then this
    python -m benchmarks.demo [RUN_DIR]

The README's block between the `demo` marks is written from the result file; a test holds the two together.

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
from soppu.evaluate.wording import bounded, gains, made_by, served
from soppu.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
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
        "gains": report["gains"],
        "align": report["align"],
        "federation": {k: report["federation"][k] for k in ("rounds", "bytes_up", "bytes_down", "seconds")},
        "compression": {
            key: report["compression"][key]
            for key in (
                "method",
                "target",
                "k",
                "k_used",
                "clusters",
                "whitened",
                "dtype",
                "bytes_before",
                "bytes_after",
                "ratio",
                "ratio_16_bit",
                "parameters_before",
                "parameters_after",
                "relative_error",
                "lower_bound",
            )
        }
        | {"relative_achieved": report["compression"]["certificate"]["relative_achieved"]},
        "gate": report["gate"],
        "stages": report["stages"],
    }


def _users(result: dict[str, Any]) -> list[str]:
    """A row a user; where there was a shared adapter, who is served what, and what that wins."""
    shared = "gains" in result  # not in a result from before there was one
    ways = ["base", *(["shared"] if shared else []), "personal", "compressed"]
    heads = [
        "user",
        "held-out examples",
        "loss base",
        *ways[1:],
        "gain kept",
        *(["served"] if shared else []),
    ]
    rows = [heads, ["---"] * len(heads)]
    for user in result["users"]:
        losses = [f"{user[f'loss_{way}']:.3f}" for way in ways]
        told = [user["id"], str(user["examples"]), *losses, f"{100 * user['gain_kept']:.1f} %"]
        rows.append([*told, *([user["served"]] if shared else [])])
    table = [f"| {' | '.join(row)} |" for row in rows]
    table[1] = f"|{'|'.join(rows[1])}|"
    said = ["", " ".join([f"Served: {served(result)}.", *gains(result)])] if shared else []
    return [*table, *said]


def block(result: dict[str, Any]) -> str:
    """The README's Markdown for a result file."""
    made, rounds = result["compression"], result["federation"]
    errors = made["relative_error"]
    seconds = {stage["name"]: stage["seconds"] for stage in result["stages"]}
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value >= 1)
    return "\n".join(
        [
            *_users(result),
            "",
            f"Losses are nats a token on held-out functions. {len(result['users'])} adapters of"
            f" {_mb(made['bytes_before'])} (float32) became one bundle of {_mb(made['bytes_after'])}"
            f" ({made_by(made)}; {made['dtype']}): {made['ratio']:.1f}x fewer bytes on disk,"
            f" {made['ratio_16_bit']:.1f}x fewer than at 16 bits a number. Relative error:"
            f" {100 * errors['rms']:.1f} % root mean square, {100 * errors['mean']:.1f} % mean,"
            f" {100 * errors['max']:.1f} % worst user. {_bound(made)}"
            f" {rounds['rounds']} rounds carried {_mb(rounds['bytes_down'])} to the clients and"
            f" {_mb(rounds['bytes_up'])} back.",
            "",
            f"{total / 60:.1f} minutes of stages ({parts}) on {result['hardware']}; commit"
            f" `{result['commit'][:12]}`, seed {result['seed']}. Source: `benchmarks/results/demo.json`.",
        ]
    )


def _bound(made: dict[str, Any]) -> str:
    """What the certificate says: of shared bases alone, users and modules weighing the same."""
    if not bounded(made):
        return "The certificate, which speaks of one shared basis a module, has no bound."
    return (
        f"The shared bases with a core for every user and nothing else leave"
        f" {100 * made['relative_achieved']:.1f} %, every user and module weighing the same; no bases of"
        f" these ranks could leave less than {100 * made['lower_bound']:.1f} %."
    )


def with_block(readme: str, text: str) -> str:
    """The README with its demo block replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def main() -> None:
    """Read the run's report, write the result file."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "latest")
    result = figures(read(folder / "report.json"))
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    readme = ROOT / "README.md"
    write_text(readme, with_block(readme.read_text(), block(result)))
    print(f"written: {RESULT} and the demo's table in {readme}")


if __name__ == "__main__":
    main()
