"""report.html: what report.html.jinja needs that report.json does not hold as it is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from soppu.evaluate import plots, wording
from soppu.evaluate.templates import template
from soppu.evaluate.tradeoff import plot, table
from soppu.evaluate.tradeoff.schema import FILE, PAGE, Tradeoff

Row = Mapping[str, Any]

_FOLDED = 24  # rows above which a table starts folded


def page(report: Row, *, arms: Tradeoff | None = None) -> str:
    """The whole page, with the run's arms if they were compared. The same report gives the same text."""
    return template("report.html.jinja").render(
        report,
        arms_table=table.text(arms) if arms else "",
        arms_texts=arms.texts if arms else "",
        folded=_FOLDED,
        figures=plots.figures(report) | ({"arms": plot.svg(arms)} if arms else {}),
        modules=list(_modules(report["compression"])),
        served=wording.served(report),
        gain_sentences=wording.gains(report),
        lost=wording.lost(report),
        refit=wording.refit(report),
        measured_on=wording.measured_on(report),
        curl=wording.curl(report),
        arms_file=FILE,
        arms_page=PAGE,
        NONE=wording.NONE,
    )


def _modules(made: Row) -> Iterator[tuple[str, Any, Any, tuple[float | None, ...]]]:
    """Name, rank, steps, and the mean error, worst error, bases' error and bound of every module."""
    for name, by_user in made["by_module"].items():
        known = [value for value in by_user.values() if value is not None]
        # a module without a basis has nothing to certify
        part = made["certificate"]["modules"].get(name, {}) if made["k_used"].get(name) else {}
        shares = (
            fmean(known) if known else None,
            max(known, default=None),
            _relative(part, "achieved"),
            _relative(part, "lower_bound") if wording.bounded(made) else None,
        )
        yield name, made["k_used"].get(name, wording.NONE), made["steps"].get(name, wording.NONE), shares


def _relative(part: Row, name: str) -> float | None:
    """A squared error of unit-norm adapters as a root-mean-square relative error."""
    value, total = part.get(name), part.get("total")
    return math.sqrt(max(value, 0.0) / total) if total and value is not None else None
