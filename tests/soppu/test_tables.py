"""Tables: plain where a program reads them, folded and never cut short on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from soppu import tables

HEADS = ("user", "bytes", "adapter")
LONG = "a-" + "0123456789" * 12
ROWS = [("alice", "1,024", LONG), ("[bold]bob[/] :smile:", "7", "a-1"), ("日本語", "12", "")]


def test_plain_text_is_a_line_a_row_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = tables.render(HEADS, ROWS, right=(1,)).split("\n")
    assert lines == [
        f"{'user':20}  bytes  adapter",
        f"{'alice':20}  1,024  {LONG}",
        "[bold]bob[/] :smile:      7  a-1",
        "日本語" + " " * 14 + "  " + "   12",
    ]


def test_a_rule_is_as_wide_as_each_column() -> None:
    rule = tables.render(HEADS, ROWS, right=(1,), rule=True).split("\n")[1]
    assert rule == f"{'-' * 20}  {'-' * 5}  {'-' * len(LONG)}"


def test_no_rows_leave_the_heads() -> None:
    assert tables.render(HEADS, []) == "user  bytes  adapter"
    assert tables.render(HEADS, [], rule=True).split("\n")[1] == "----  -----  -------"


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_terminal_gets_folded_cells_and_no_digit_less(width: int) -> None:
    rows = [("alice", LONG), ("[bold]bob[/]", "")]
    text = re.sub(r"\x1b\[[\d;]*m", "", tables.render(("user", "adapter"), rows, width=width))
    assert max(map(len, text.split("\n"))) <= width
    assert "".join(re.findall(r"\d", text)) == LONG[2:]
    assert "[bold]b" in text


def test_heads_are_bold_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1m" in tables.render(HEADS, ROWS, width=80)
    assert "\x1b" not in tables.render(HEADS, ROWS)


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("133", 133)])
def test_a_terminal_has_the_width_it_says(columns: str, width: int) -> None:
    code = "from soppu import tables; print(tables.terminal_width())"
    child, ours = pty.openpty()
    environment = {**os.environ, "COLUMNS": columns}
    subprocess.run([sys.executable, "-c", code], stdout=ours, env=environment, check=True)
    assert os.read(child, 100).split() == [str(width).encode()]
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, check=True)
    assert piped.stdout.split() == [b"0"]
    os.close(child)
    os.close(ours)
