"""What the benchmark keeps of a comparison."""

from __future__ import annotations

from benchmarks.evaluate import FIELDS, result
from soppu.evaluate.tradeoff import schema
from tests.soppu.evaluate.tradeoff.example import comparison


def test_every_row_has_the_fields_of_the_result_and_the_arms_are_there() -> None:
    made = result(schema.check(comparison(), source="x"))
    assert [(row["user"], row["arm"]) for row in made["rows"]] == [
        (user, arm) for user in ("alice", "bob") for arm in ("base", "residual@16")
    ]
    assert all(set(FIELDS) <= row.keys() for row in made["rows"])
    assert made["rows"][1]["interval"] == comparison()["rows"][1]["interval"]
    assert [arm["name"] for arm in made["arms"]] == ["base", "residual@16"]
