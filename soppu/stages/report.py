"""Stage: the report of a run, from what the other stages wrote into its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from soppu.compress.bundle.report import CompressionReport
from soppu.evaluate import report as reports
from soppu.evaluate import summary
from soppu.evaluate.gate import Verdict
from soppu.evaluate.losses import UserLosses
from soppu.evaluate.report import ReportInputs
from soppu.stages import text
from soppu.stages.federate import RESULT
from soppu.stages.published import TOLD, Published, serving_file, stage_name, target_names
from soppu.stages.run import Run, open_run

BEFORE = ("prepare", "federate", "collect", "compress", "evaluate", "tradeoff")


@dataclass(frozen=True)
class Written:
    """Where the report is, and the two tables Prefect shows of it."""

    html: Path
    users_markdown: str
    compression_markdown: str


def write_report(run_folder: str, evaluation: str) -> Written:
    """Write report.json and report.html with everything known so far, and point `latest` at the run.

    Called before publication as well as after, so that a refused bundle has a report that says why.
    """
    run = open_run(run_folder)
    found = run.read(evaluation)
    bundle_id = found["bundle_id"]
    compression = run.read(f"compression-{bundle_id[:16]}.json")
    names = target_names(run_folder)
    rows = {name: run.read(serving_file(name)) for name in names}  # perhaps of an earlier bundle
    told = {name: row for name, row in rows.items() if row.get("bundle_id") == bundle_id}
    live = [one for one in told.values() if not one["error"]]
    noted = [run.read(f"stages/{name}.json") for name in (*BEFORE, *map(stage_name, told))]
    inputs = ReportInputs(
        run=run.id,
        config=run.config,
        losses=[UserLosses.from_dict(item) for item in found["losses"]],
        adapter_ids=found["adapters"],
        compression=CompressionReport.from_dict(compression),
        bytes_before=compression["bytes_before"],
        bytes_after=compression["bytes_after"],
        verdict=Verdict.from_dict(found["verdict"]),
        set_id=found["set_id"],
        bundle_id=bundle_id,
        base_hash=run.base().hash,
        measured=found["measured"],
        federation=_federation(run),
        serving={name: live[0][name] for name in TOLD} if live else None,
        targets=[{field.name: one[field.name] for field in fields(Published)} for one in told.values()],
        stages=[stage for stage in noted if stage],
    )
    report = reports.build(inputs)
    _, html = reports.write(run.folder, report)
    _point_latest(run.folder)
    return Written(html, summary.markdown_users(report), summary.markdown_compression(report))


def _federation(run: Run) -> dict[str, Any] | None:
    """What the federation told, and with those it refused also those whose text was left out before it."""
    told = run.read(RESULT)
    left_out = run.read(text.FILE).get("left_out", {})
    return {**told, "refused": {**left_out, **told["refused"]}} if told else None


def _point_latest(folder: Path) -> None:
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(folder.parent / "latest")
