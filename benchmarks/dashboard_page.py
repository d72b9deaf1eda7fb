"""The table of docs/dashboard.md, from its result file to between the page's marks.

python -m benchmarks.dashboard_page
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "dashboard.md"
MARKS = ("dashboard",)


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    if not (found := read_result("dashboard")):
        return {}
    parts = [_views(found), _beside(found), circumstances_line(found)]
    return {"dashboard": "\n\n".join(parts)}


def _views(found: Mapping[str, Any]) -> str:
    """Every view by number of users: milliseconds of the answer, and of the first paint."""
    rows = found["rows"]
    lines = []
    for view in rows[0]["ms"]:
        cells = [view]
        for row in rows:
            one = row["ms"][view]
            cells += [f"{one['p50']:.0f} / {one['max']:.0f}", f"{row['first_paint_ms'][view]:.0f}"]
        lines.append(cells)
    head = [cell for row in rows for cell in (f"{row['users']:,} users, median / most", "first paint")]
    return markdown(["ms", *head], lines)


def _beside(found: Mapping[str, Any]) -> str:
    """What the server did meanwhile, memory, and the reading of large reports."""
    rows = found["rows"]
    asked = " / ".join(f"{row['server_requests_per_second']:.1f}" for row in rows)
    memory = " / ".join(f"{row['rss']['end'] / 1e6:.0f}" for row in rows)
    told = [
        f"Each view was asked for {found['rounds']} times, while the embedded server it looks at answered"
        f" {asked} requests of {found['tokens']} tokens a second, {found['under_way']} at a time, on the same"
        f" machine. First paint is Chromium's, once a view. The page's process took {memory} MB."
    ]
    for row in rows:
        if one := row["while_reading"]:
            told.append(
                f"With {row['users']:,} users reports were read within {one['seconds']:.0f} s of the start;"
                f" the fleet's page took {one['ms']['p50']:.0f} ms meanwhile, at the most"
                f" {one['ms']['max']:.0f} ms."
            )
    return " ".join(told)


def write_page() -> None:
    """Fill the page."""
    fill(blocks(), PAGE)


if __name__ == "__main__":
    write_page()
