"""Stage: the report of a run, from what the other stages wrote into its folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from soppu import files
from soppu.compress.bundle.report import CompressionReport
from soppu.evaluate import report as reports
from soppu.evaluate import summary
from soppu.evaluate.gate import Verdict
from soppu.evaluate.losses import UserLosses
from soppu.evaluate.report import ReportInputs
from soppu.federation.chosen_basis import COHORT
from soppu.progress import telling
from soppu.stages import grow, join_notes, text
from soppu.stages.basis import STAGE as BASIS
from soppu.stages.federate import RESULT
from soppu.stages.forms import has_cohort
from soppu.stages.published import TOLD, Published, serving_file, stage_name, target_names
from soppu.stages.run import Run, open_run

BEFORE = ("prepare", COHORT, BASIS, "federate", "collect", "compress", "evaluate", "tradeoff")


def stage_names(run_folder: str, *, trains: bool) -> tuple[str, ...]:
    """What a run will do, in order.

    Args:
        trains: False where it takes the adapters that users have.
    """
    run = open_run(run_folder)
    begins = trains and has_cohort(run)
    left_out = {"federate": not trains, "tradeoff": not run.config.evaluate.arms}
    left_out |= {COHORT: not begins, BASIS: not begins}
    before = [name for name in BEFORE if not left_out.get(name)]
    return (*before, "report", *map(stage_name, target_names(run_folder)))


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
    with telling.stage(run.folder, "report"):
        return _write_report(run, evaluation)


def _write_report(run: Run, evaluation: str) -> Written:
    found = run.read(evaluation)
    bundle_id = found["bundle_id"]
    compression = run.read(f"compression-{bundle_id[:16]}.json")
    names = target_names(str(run.folder))
    rows = {name: run.read(serving_file(name)) for name in names}  # perhaps of an earlier bundle
    same = join_notes.came_of(run, bundle_id)  # who joined since has changed nobody else
    told = {name: row for name, row in rows.items() if row.get("bundle_id") in same}
    live = [one for one in told.values() if not one["error"]]
    noted = [run.read(f"stages/{name}.json") for name in (*BEFORE, grow.STAGE, *map(stage_name, told))]
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
        basis=found.get("basis"),
        federation=_federation(run),
        serving={name: live[0][name] for name in TOLD} if live else None,
        targets=[{field.name: one[field.name] for field in fields(Published)} for one in told.values()],
        stages=[stage for stage in noted if stage],
    )
    report = reports.build(inputs)
    _, html = reports.write(run.folder, report)
    files.point(run.folder.parent / "latest", run.folder.name)
    return Written(html, summary.markdown_users(report), summary.markdown_compression(report))


def _federation(run: Run) -> dict[str, Any] | None:
    """What the federation told, and with those it refused also those whose text was left out before it."""
    told = run.read(RESULT)
    left_out = run.read(text.FILE).get("left_out", {})
    return {**told, "refused": {**left_out, **told["refused"]}} if told else None
