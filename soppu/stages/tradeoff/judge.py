"""Stage: the comparison that a configuration asks for, and the gate's rules on its figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from soppu import files
from soppu.evaluate.gate import Verdict
from soppu.evaluate.tradeoff import plot, rules, schema, table
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages.run import Run, open_run
from soppu.stages.tradeoff.run import Measuring, compare

TRADEOFF = "tradeoff"  # of an evaluation: the file of the comparison that its verdict has heard
RULES = (
    "rules"  # of a join, which compares no arms: the rules that its verdict has heard, or was told to waive
)


@dataclass(frozen=True)
class Judged:
    """An evaluation with the comparison's say in its verdict, and what an orchestrator shows of it."""

    evaluation: str
    path: Path
    plot: Path
    markdown: str


def wanted(run_folder: str) -> bool:
    """Whether the run's configuration names arms: nobody pays for what they did not ask for."""
    return bool(open_run(run_folder).config.evaluate.arms)


def tradeoff(run_folder: str, evaluation: str, *, on_progress: Tell | None = None) -> Judged:
    """Compare the arms of the configuration, and write the evaluation anew with the rules' verdict in it.

    The evaluation that was there stays; publishing asks the new one. Raises as `compare`.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, "tradeoff", on_progress=on_progress) as tell:
        return _tradeoff(run, evaluation, tell)


def _tradeoff(run: Run, evaluation: str, tell: Tell) -> Judged:
    told = run.read(evaluation)
    path = compare(str(run.folder), told["set_id"], how=Measuring(tell))
    found = schema.read(path)
    verdict = Verdict.from_dict(told["verdict"])
    reasons = (*verdict.reasons, *rules.broken(found, run.config.gate.rules))
    verdict = dataclasses.replace(verdict, passed=not reasons, reasons=reasons)
    name = f"{evaluation.removesuffix('.json')}-{path.stem.removeprefix('tradeoff-')}.json"
    run.write(name, {**told, TRADEOFF: path.name, "verdict": verdict.to_dict()})
    picture = path.with_suffix(".svg")
    files.write_text(picture, plot.svg(found, alone=True))
    return Judged(name, path, picture, table.markdown_table(found))


def unheard(run: Run, evaluation: str) -> list[str]:
    """The rules that an evaluation's verdict has not heard: nothing is published before it has."""
    told = run.read(evaluation)
    if told.get(TRADEOFF):
        return []
    without = [rule for rule in run.config.gate.rules if rule not in told.get(RULES, ())]
    return [f"gate.rules: {rule!r}: the arms were not compared" for rule in without]
