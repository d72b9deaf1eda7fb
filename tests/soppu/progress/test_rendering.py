"""From recorded events to what people read: a function of the events, and nothing else."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from soppu.progress.events import DONE, FAILED, Event
from soppu.progress.lines import duration, lines
from soppu.progress.picture import picture
from soppu.progress.screen import screen
from tests.soppu.progress.recorded import LINES, RECORDED, at_round, event

GOING_ON = next(place for place, one in enumerate(RECORDED) if one.round == 2 and one.user) + 1


def drawn(
    events: list[Event], *, width: int = 100, rows: int = 24, now: float = 1025.0, **console: Any
) -> list[str]:
    out = io.StringIO()
    shown = Console(file=out, width=width, **console)
    shown.print(screen(picture(events), title="runs/demo", now=now, size=(width, rows)))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_run_is_one_line_a_stage_a_round_and_a_warning() -> None:
    assert lines(RECORDED) == LINES


def test_lines_are_only_ever_added() -> None:
    for many in range(len(RECORDED)):
        some = lines(RECORDED[:many])
        assert some == LINES[: len(some)]


def test_a_thousand_notes_of_one_stage_are_no_lines() -> None:
    told = [event(n, "compress", note=f"{n} of 1000 users", share=n / 1000) for n in range(1000)]
    assert lines([event(0, "compress", "began"), *told]) == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_picture_at_the_end_has_every_stage_as_it_ended() -> None:
    found = picture(RECORDED)
    assert {name: stage.state for name, stage in found.stages.items()} == {
        "prepare": DONE,
        "federate": DONE,
        "collect": "kept",  # never begun: a retry of the flow found its result
        "compress": DONE,
        "publish embedded": FAILED,
    }
    assert found.stages["federate"].attempts == 2
    assert (found.ended, found.error) == (FAILED, "TargetError: nobody answers")


def test_in_the_middle_the_screen_has_the_round_the_user_time_left_and_the_last_warning() -> None:
    shown = "\n".join(drawn(RECORDED[:GOING_ON]))
    for words in ("runs/demo", "round 2 of 3", "user bob", "at work", " 50%", "attempt 2"):
        assert words in shown, shown
    # a tenth of it took 5 s, half is left
    assert "about 25 s left of federate" in shown
    assert "FederationError: killed" in shown
    assert "waiting" in shown and "compress" in shown


def test_time_left_is_not_guessed_from_nothing_and_counts_down_in_silence() -> None:
    begun = [RECORDED[0], event(17, "federate", "began"), at_round(20, 2, 0.4)]
    assert picture(begun).stages["federate"].left(1050.0) is None
    moved = [*begun, at_round(25, 2, 0.5)]
    left = picture(moved).stages["federate"].left
    assert left(1025.0) == pytest.approx(25.0) and left(1035.0) == pytest.approx(15.0)
    assert left(2000.0) == 0.0


def test_silence_is_told() -> None:
    assert not any("nothing heard" in line for line in drawn(RECORDED[:GOING_ON]))
    assert any("nothing heard for 2:00" in line for line in drawn(RECORDED[:GOING_ON], now=1145.0))


@pytest.mark.parametrize("width", [8, 20, 43, 44, 60, 200])
def test_no_line_is_longer_than_the_terminal_and_every_stage_has_one(width: int) -> None:
    long = at_round(26, 2, 0.5, "round 2 of 3: " + "x" * 500, user="y" * 300)
    shown = drawn([*RECORDED[:GOING_ON], event(26, "federate", "warned", note="z" * 900), long], width=width)
    assert all(len(line) <= width for line in shown)
    assert len(shown) == 1 + 5 + 2 + 1  # title, stages, where it is, the warning


def test_without_colours_no_colour_is_written() -> None:
    out = drawn(RECORDED[:GOING_ON], force_terminal=True, no_color=True)
    assert not any(f"\x1b[{code}m" in line for line in out for code in ("31", "32", "33"))


def test_a_user_may_be_called_anything() -> None:
    said = at_round(26, 2, 0.5, "[bold]x[/] \x1b[31mred", user="[link=x]é\n")
    shown = "\n".join(drawn([*RECORDED[:GOING_ON], said]))
    assert "[bold]x[/] red" in shown and "user [link=x]é " in shown and "\x1b" not in shown
    assert lines([replace(said, round=9, note="\x1b]0;title\x07a\tb\x9bm")]) == ["federate: a b m"]


@pytest.mark.parametrize("rows", [3, 7, 8, 9])
def test_a_low_terminal_keeps_the_stage_at_work_and_where_it_is(rows: int) -> None:
    for many in range(GOING_ON, len(RECORDED) + 1):
        shown, found = drawn(RECORDED[:many], rows=rows, now=1300.0), picture(RECORDED[:many])
        assert len(shown) <= max(rows, 1 + 1 + 2 + 1)
        if found.now:
            assert any(line.startswith(found.now.name) for line in shown)
