"""What is held out where there are dates: the newest quarter, on every machine, whatever else changes."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu import data
from soppu.data.examples import Example, Record
from soppu.data.records import Layout, record
from soppu.data.split import split
from soppu.errors import DataError
from tests.soppu.data.conftest import pairs, settings_of, write_rows

DAY = datetime(2026, 1, 1, tzinfo=UTC)


def dated(count: int, **more: object) -> list[dict[str, object]]:
    rows = pairs("a", count)
    return [{**row, "date": (DAY + timedelta(days=n)).isoformat(), **more} for n, row in enumerate(rows)]


def test_the_newest_quarter_is_held_out(tmp_path: Path) -> None:
    found = data.load_user(settings_of(write_rows(tmp_path / "x.jsonl", dated(12)[::-1])), "a")
    assert {item.prompt for item in found.heldout} == {"a asks 9", "a asks 10", "a asks 11"}
    assert len(found.train) + len(found.validation) == 9


@pytest.mark.parametrize(
    "write",
    [
        lambda day: day.strftime("%Y-%m-%d"),
        lambda day: day.strftime("%Y%m%d"),
        lambda day: day.isoformat().replace("+00:00", "Z"),
        lambda day: (day + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00",
        lambda day: day.replace(tzinfo=None).isoformat(),
        lambda day: day.timestamp(),
        lambda day: int(day.timestamp() * 1000),
        lambda day: str(int(day.timestamp())),
    ],
)
@pytest.mark.parametrize("key", ["date", "timestamp"])
def test_a_date_may_be_written_in_many_ways(write: object, key: str, tmp_path: Path) -> None:
    rows = [{**row, key: write(DAY + timedelta(days=n))} for n, row in enumerate(pairs("a", 8))]  # type: ignore[operator]
    found = data.load_user(settings_of(write_rows(tmp_path / "x.jsonl", rows)), "a")
    assert {item.prompt for item in found.heldout} == {"a asks 6", "a asks 7"}


def test_another_column_or_none_may_hold_the_date(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{**row, "sent": 9 - n} for n, row in enumerate(pairs("a", 8))])
    by_sent = data.load_user(settings_of(path, date_column="sent"), "a")
    assert {item.prompt for item in by_sent.heldout} == {"a asks 0", "a asks 1"}
    path = write_rows(tmp_path / "y.jsonl", dated(40))
    by_content = data.load_user(settings_of(path, date_column=""), "a")
    undated = data.load_user(settings_of(write_rows(tmp_path / "z.jsonl", pairs("a", 40))), "a")
    assert by_content == undated != data.load_user(settings_of(path), "a")


def test_dates_are_for_all_of_a_users_examples_or_none(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [*dated(6), *pairs("a", 9)[6:], *pairs("b", 9)])
    with pytest.raises(DataError, match=r"'a' .*6 of 9 examples have a date.*data\.date_column"):
        data.load_user(settings_of(path), "a")
    assert data.load_user(settings_of(path), "b").train


@settings(max_examples=60)
@given(
    days=st.lists(st.integers(0, 20), min_size=2, max_size=40),
    newer=st.lists(st.integers(20, 30), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_nothing_newer_is_trained_on_and_growth_moves_nothing_back(
    days: list[int], newer: list[int], order: object
) -> None:
    records = [Record(Example(str(n), "c"), float(day)) for n, day in enumerate(days)]
    date = {item.example: item.date for item in records}
    train, held = split(records, who="a")
    assert len(held) == max(1, len(days) // 4) and len(train) + len(held) == len(days)
    assert max(date[item] for item in train) <= min(date[item] for item in held)
    shuffled = list(records)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split(shuffled, who="a") == (train, held)
    grown = [*records, *(Record(Example(f"new {n}", "c"), float(day)) for n, day in enumerate(newer))]
    if all(day > max(days) for day in newer):
        assert not set(train) & set(split(grown, who="a")[1])


def test_a_repeat_counts_with_its_first_date() -> None:
    records = [Record(Example(str(n), "c"), float(n)) for n in range(8)]
    train, held = split([*records, Record(Example("0", "c"), 99.0)], who="a")
    assert Example("0", "c") in train and len(held) == 2


def test_a_date_without_a_zone_is_utc_wherever_the_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "date": f"2026-03-2{8 + n % 2}T0{n % 4}:30:00"} for n, row in enumerate(pairs("a", 8))]
    config = settings_of(write_rows(tmp_path / "x.jsonl", rows))
    there = []
    for zone in ("UTC", "Europe/Berlin", "America/New_York"):  # an hour of that night is not there in Berlin
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        there.append(data.load_user(config, "a"))
    monkeypatch.undo()
    time.tzset()
    assert there[0] == there[1] == there[2]
    first = record(rows[0], "", Layout(), user=True)
    assert first.date == datetime(2026, 3, 28, 0, 30, tzinfo=UTC).timestamp()
