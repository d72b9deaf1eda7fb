"""What follows from the study's rows: gains over shared, the front of gain by numbers, the smallest form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.personal_arms import FULL, MORE, OURS, SHARED
from soppu.evaluate.intervals import Interval, interval

Row = Mapping[str, Any]


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with what they win over shared and against the full LoRA, user by user.

    Over shared trained for as many steps more as a personal arm gets, or, where that is missing, the shared
    adapter itself; a corpus with neither stays as it is. `worst` is the loss of the user who wins least,
    above shared's; `interval` the 95 % interval over users of the mean gain; `over_full` and its interval
    what an arm wins over the full LoRA; `kept` its share of the full LoRA's gain.
    """
    return [dict(row) | _beside(row, rows) for row in rows]


def _beside(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    named = {other["arm"]: other["losses"] for other in rows if other["corpus"] == row["corpus"]}
    shared, full = named.get(MORE, named.get(SHARED)), named.get(FULL)
    if shared is None:
        return {}
    gains = _differences(shared, row["losses"])
    found = _over_users(gains)
    told: dict[str, Any] = {
        "worst": float(-gains.min()),
        "gain": found.mean,
        "interval": (found.low, found.high),
        "better_than_shared": int((gains > 0).sum()),
    }
    if full is not None:
        whole, over = _differences(shared, full), _differences(full, row["losses"])
        apart = _over_users(over)
        told |= {"over_full": apart.mean, "over_full_interval": (apart.low, apart.high)}
        told["kept"] = found.mean / float(whole.mean()) if whole.mean() > 0 else None
    return told


def won(row: Row, over: Row) -> tuple[float, float, float]:
    """What one wins over another in the mean, and the ends of its 95 % interval over users."""
    found = _over_users(_differences(over["losses"], row["losses"]))
    assert found.low is not None and found.high is not None
    return found.mean, found.low, found.high


def _over_users(apart: Any) -> Interval:
    """The mean of users' differences, each weighing the same, with its 95 % interval."""
    return interval(apart, np.ones(len(apart)), seed=0)


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> Any:
    return np.array([before[user] - loss for user, loss in after.items()])


def by_corpus(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each corpus, in the order in which these are met first."""
    return [
        (name, [r for r in rows if r["corpus"] == name]) for name in dict.fromkeys(r["corpus"] for r in rows)
    ]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (numbers, gain) no other one beats: none has as few numbers or fewer, and more gain.

    Of equal points the first one is there. In order of numbers. O(n log n).
    """
    best, found = -np.inf, []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index)):
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return found


def smallest(rows: Sequence[Row], *, share: float = 0.95) -> Row | None:
    """Of a corpus' compared rows: ours of fewest numbers that keeps a share of the full LoRA's gain."""
    enough = [row for row in rows if row["arm"] in OURS and (row.get("kept") or 0.0) >= share]
    return min(enough, key=lambda row: (row["numbers"], -row["kept"]), default=None)


def beside_controls(rows: Sequence[Row]) -> list[tuple[Row, Row | None, tuple[float, float, float] | None]]:
    """Every control with numbers of a user's own, beside the best of ours with at most as many.

    (control, ours, (what ours wins over it, and the ends of its 95 % interval over users)); no ours where all
    have more numbers.
    """
    told: list[tuple[Row, Row | None, tuple[float, float, float] | None]] = []
    for control in (row for row in rows if row["arm"] not in OURS and row["numbers"]):
        fit = [row for row in rows if row["arm"] in OURS and row["numbers"] <= control["numbers"]]
        best = min(fit, key=lambda row: row["mean"], default=None)
        if best is None:
            told.append((control, None, None))
            continue
        told.append((control, best, won(best, control)))
    return told
