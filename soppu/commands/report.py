"""`soppu report`: render a run's page again from its report.json, and print the summary."""

from __future__ import annotations

from pathlib import Path

import click

from soppu import tables
from soppu.evaluate import report, summary


@click.command("report")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prefect-url", default="", help="Address of a Prefect UI, to be named in the summary.")
@click.option("--open", "only_path", is_flag=True, help="Print only the path of report.html.")
def report_command(run_dir: Path, prefect_url: str, only_path: bool) -> None:
    """Render report.html in RUN_DIR again from report.json, and print the summary.

    `--open` is for other programs: `xdg-open "$(soppu report --open runs/today)"`.
    """
    found = report.read(run_dir / report.JSON_FILE)
    page = report.render(run_dir, found).resolve()
    width = tables.terminal_width()
    text = summary.text(found, report_path=str(page), prefect_url=prefect_url, width=width)
    click.echo(str(page) if only_path else text)
