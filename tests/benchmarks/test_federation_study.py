"""What the federation study holds its arms against."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.federation import compared


def row(arm: str, mode: str, *losses: float, corpus: str = "stdlib") -> dict[str, Any]:
    told = dict(zip("abc", losses, strict=True))
    return {"corpus": corpus, "arm": arm, "mode": mode, "losses": told, "mean": sum(losses) / 3}


def test_every_arm_is_held_against_the_shared_adapter_of_the_plain_one() -> None:
    rows = [
        row("finetune", "shared", 2.0, 2.0, 2.0),
        row("finetune", "finetune", 1.5, 1.8, 2.1),
        row("finetune, no alignment", "shared", 9.0, 9.0, 9.0),  # worse: against it everybody would win
        row("local", "local", 2.5, 1.0, 2.0),
    ]
    for order in (rows, rows[::-1]):
        told = {(found["arm"], found["mode"]): found for found in compared(order)}
        assert told["finetune", "shared"]["gain"] == 0
        assert told["finetune", "finetune"]["gain"] == pytest.approx(0.2)
        assert told["finetune", "finetune"]["worst"] == pytest.approx(0.1)
        assert told["finetune", "finetune"]["better_than_shared"] == 2
        assert told["finetune, no alignment", "shared"]["gain"] == pytest.approx(-7.0)
        assert told["local", "local"]["better_than_shared"] == 1


def test_a_corpus_without_that_arm_is_held_against_nothing() -> None:
    rows = [
        row("finetune", "shared", 2.0, 2.0, 2.0),
        row("local", "local", 1.0, 1.0, 1.0, corpus="docstrings"),
    ]
    assert "gain" not in compared(rows)[1]
