"""Which rows of benchmarks/results/serve.json a run replaces, and of which its head tells."""

from __future__ import annotations

from typing import Any

from benchmarks.serve import merged


def row(method: str, turns: str) -> dict[str, Any]:
    return {"users": 9, "shape": "qv30", "method": method, "turns": turns}


OLD: dict[str, Any] = {
    "commit": "old",
    "rows": [
        {"users": 1},
        {"users": 9},
        {"users": 9, "shape": "qv30", "method": "joint", "turns": "largest"},
    ],
}


def test_the_largest_turn_alone_leaves_the_table_of_all_turns_and_its_head() -> None:
    found = merged(OLD, {"commit": "new"}, [row("cores", "largest")])
    assert found == {**OLD, "rows": [*OLD["rows"], {**row("cores", "largest"), "commit": "new"}]}


def test_a_run_of_all_turns_replaces_them_all_and_the_head() -> None:
    found = merged(OLD, {"commit": "new"}, [row("cores", "all")])
    assert found == {"commit": "new", "rows": [{**row("cores", "all"), "commit": "new"}, OLD["rows"][2]]}


def test_a_run_again_replaces_its_own_rows() -> None:
    found = merged(OLD, {"commit": "new"}, [row("joint", "largest")])
    assert found["commit"] == "old"
    assert found["rows"] == [*OLD["rows"][:2], {**row("joint", "largest"), "commit": "new"}]
