"""How commands print a bundle: tables, and the lines that sum it up."""

from __future__ import annotations

from collections.abc import Sequence

import click

from soppu import tables
from soppu.compress import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.options import ratio


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their head, first column to the left, the others to the right, and an empty line."""
    click.echo(tables.render(head, rows, right=range(1, len(head)), width=tables.terminal_width()))
    click.echo()


def summary(bundle: Bundle, size: int) -> None:
    """Print what a bundle of `size` bytes holds, how good it is, and how much smaller."""
    report = bundle.report
    asked = f"target {report.target}" if report.target else "no target"
    weighed = ", errors weighed by calibration" if report.whitened else ""
    click.echo(f"users        {len(bundle.users)}, modules {len(bundle.shapes)}, clusters {report.clusters}")
    click.echo(f"method       {report.method}, rank up to {report.rank}, {asked}{weighed}; {report.storage}")
    click.echo(
        f"error        root mean square {report.relative_error_rms:.5f},"
        f" mean {report.relative_error_mean:.5f}, worst {report.relative_error_max:.5f}"
    )
    if report.lost_users:
        count = f"{len(report.lost_users)} of {len(report.relative_error)}"
        click.echo(f"lost users   {count}, served as the base model: {', '.join(report.lost_users)}")
    if report.lost_modules:
        count = f"{len(report.lost_modules)} of {len(report.module_error)}"
        click.echo(f"lost modules {count}, nothing kept of anybody: {', '.join(report.lost_modules)}")
    click.echo(f"certificate  {_certificate(report)}")
    click.echo(f"numbers      {report.parameters_before:,} -> {report.parameters_after:,}")
    click.echo(f"ratio        {ratio(report.parameters_before, size):.2f}x against 16 bits a number")


def _certificate(report: CompressionReport) -> str:
    """One line: what the shared bases leave by themselves, and the least that bases of their ranks can."""
    overall = report.overall
    if not any(report.k_used.values()):
        return "none: no module has a shared basis"
    alone = f"bases and cores alone leave {overall.relative_achieved:.5f}"
    how = "root mean square over users and modules, unrounded"
    if report.clusters > 1:
        return f"{alone} ({how}); no bound is known for several clusters"
    return f"{alone}, no bases of these ranks less than {overall.relative_lower_bound:.5f} ({how})"
