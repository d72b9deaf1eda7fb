"""Tables for people at a terminal, and for programs that read them as plain text."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNBROKEN = 1 << 20  # columns: no line of plain text is ever wrapped


def render(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int] = (),
    rule: bool = False,
    width: int = 0,
) -> str:
    """Lines of a table, without a line break at the end. No cell is ever cut short.

    Args:
        right: numbers of the columns that are aligned to the right.
        rule: a line of dashes below the heads of plain text.
        width: columns of the terminal it is for: long cells are folded, heads are bold. 0 is plain text, a
            line for each row, two spaces between columns.
    """
    table = Table(
        box=box.SIMPLE_HEAD if width else None,
        padding=(0, 1) if width else (0, 2, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if number in right else "left", overflow="fold")
    lines = [tuple(row) for row in rows]
    if rule and not width:
        table.add_row(*("-" * max(map(cell_len, column)) for column in zip(heads, *lines, strict=True)))
    for line in lines:
        table.add_row(*map(Text, line))
    out = io.StringIO()
    Console(file=out, width=width or _UNBROKEN, force_terminal=bool(width), highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def terminal_width() -> int:
    """Columns of the terminal that standard output is; 0 where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
