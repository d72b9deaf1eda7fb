"""What is refused in a stored comparison, and how that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soppu.errors import ReportError
from soppu.evaluate.tradeoff import schema
from tests.soppu.evaluate.tradeoff.example import arm, comparison, row


def test_a_comparison_reads_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / schema.FILE
    path.write_text(json.dumps(comparison()))
    assert schema.read(path).model_dump(mode="json") == comparison()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 2}, "format = 2, allowed: 1"),
        ({"extra": 1}, "extra: unknown"),
        ({"arms": []}, "arms"),
        ({"arms": [arm("base", loss=float("nan"))]}, "arms[0].loss = nan, allowed: a finite number"),
        ({"arms": [arm("base", bleu="3")]}, "arms[0].bleu = '3', allowed: a number"),
        ({"arms": [arm("base", colour="red")]}, "arms[0].colour: unknown"),
        ({"arms": [arm("base"), arm("base")]}, "arms: 'base' twice"),
        ({"rows": [row("alice", "joint@16")]}, "arm = 'joint@16', allowed: base, residual@16"),
        ({"rows": [row("alice", "base"), row("alice", "base")]}, "user 'alice' with arm 'base' twice"),
        ({"left_out": {"rouge": "no"}}, "left_out"),
    ],
)
def test_what_it_refuses(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError) as refused:
        schema.check(comparison(**changed), source="tradeoff.json")
    assert said in str(refused.value) and str(refused.value).startswith("tradeoff.json: ")


def test_every_missing_field_is_named() -> None:
    value = comparison()
    del value["arms"][0]["loss"], value["generation"]["seed"]
    with pytest.raises(ReportError, match=r"generation.seed: missing\n.*arms\[0\].loss: missing"):
        schema.check(value, source="x")


def test_a_line_of_texts_names_what_is_wrong() -> None:
    line = {"user": "a", "prompt": "p", "reference": "r", "texts": {"base": 3}, "losses": {"base": 1.0}}
    with pytest.raises(ReportError, match=r"texts.base = 3, allowed: a text"):
        schema.check_line(line, source="x")
