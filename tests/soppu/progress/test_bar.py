"""The bar of a command that does its work itself, and its lines where there is no terminal."""

from __future__ import annotations

import pytest

from soppu.progress.bar import bar


def test_without_a_terminal_a_thing_is_a_line_as_it_begins_and_a_line_a_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bar() as tell:
        for step in range(200):
            tell({"note": f"training: step {step}, loss \x1b[2J1.0", "share": step / 200})
        for number, user in enumerate(("ann", "[bold]bob"), start=1):
            tell({"note": f"evaluating: {user}", "share": number / 100})
    out, lines = capsys.readouterr()
    assert out == ""
    steps = [f"{step / 200:4.0%} training: step {step}, loss 1.0" for step in range(0, 200, 20)]
    assert lines.splitlines() == [*steps, "  1% evaluating: ann"]


def test_a_long_note_is_one_line_and_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    note = "reading: [red]" + "word " * 60 + "end"
    with bar() as tell:
        tell({"note": note, "share": 0.0})
    assert capsys.readouterr().err.splitlines() == [f"  0% {note}"]


def test_on_a_terminal_there_is_a_bar_which_goes_as_the_block_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with bar() as tell:
        tell({"note": "text of [joint]", "share": 0.5})
    shown = capsys.readouterr().err
    assert "text of [joint]" in shown and "━" in shown and shown.endswith("\x1b[2K")


def test_a_process_that_is_not_to_speak_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(shown=False) as tell:
        tell({"note": "training: step 1", "share": 0.5})
    assert capsys.readouterr() == ("", "")
