"""The arms of a run side by side, by user: benchmarks/results/evaluate.json.

    soppu evaluate runs/latest --arm personal --arm residual@16 --arm residual@32 --arm joint@16
    python -m benchmarks.evaluate runs/latest

Nothing is measured here: the rows are those of the run's newest comparison, with what it was measured on.
The commit is that of the tree this is called in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.record import circumstances, store
from soppu.evaluate.tradeoff import schema
from soppu.evaluate.tradeoff.schema import Tradeoff

FIELDS = ("user", "arm", "loss", "bleu", "codebleu", "latency_ms_p50", "bytes", "interval")
MORE = ("chrf", "exact_match", "valid", "latency_ms_p99")


def result(found: Tradeoff) -> dict[str, Any]:
    """The rows by user and the arms of a comparison, as JSON values."""
    told = found.model_dump(mode="json")
    return {
        "run": told["run"],
        "measured": told["created"],
        "environment": told["environment"],
        "generation": told["generation"],
        "arms": told["arms"],
        "left_out": told["left_out"],
        "rows": [{name: row[name] for name in (*FIELDS, *MORE)} for row in told["rows"]],
    }


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(run_dir: Path) -> None:
    """Write the result file from the newest comparison in RUN_DIR."""
    found = schema.read(run_dir / schema.FILE)
    packages = ("torch", "numpy", "transformers", *found.environment.packages)
    about = circumstances(seed=found.environment.seed, packages=tuple(dict.fromkeys(packages)))
    path = store("evaluate", about | {"hardware": found.environment.hardware} | result(found))
    print(f"{len(found.rows)} rows of {len(found.arms)} arms in {path}")


if __name__ == "__main__":
    main()
