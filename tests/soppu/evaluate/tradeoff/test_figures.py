"""Means, intervals and what is left out, of measurements made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from soppu.evaluate.losses import ExampleLosses
from soppu.evaluate.tradeoff import figures, schema, table
from soppu.evaluate.tradeoff.figures import Measured
from soppu.evaluate.tradeoff.texts import Said
from tests.soppu.evaluate.tradeoff.example import arm, comparison

LOSSES = {
    "ann": ExampleLosses((10, 30), {"base": (20.0, 90.0), "personal": (10.0, 70.0)}),
    "bob": ExampleLosses((5, 0), {"base": (10.0, 0.0), "personal": (9.0, 0.0)}),
}


def measured(name: str, text: str) -> Measured:
    about = {key: value for key, value in arm(name).items() if key in ("name", "kind", "bytes")}
    said = {user: [Said("say", "a b c d e", text)] for user in LOSSES}
    return Measured(about, said=said, latency_ms={"ann": [10.0, 20.0], "bob": [30.0]})


ARMS = [measured("base", "x"), measured("personal", "a b c d e")]


def test_an_arm_is_the_mean_over_users_and_what_it_wins_is_paired() -> None:
    scores = figures.scores(ARMS, LOSSES, metrics=["loss", "bleu"])
    base, personal = figures.arms_of(ARMS, scores, seed=0)
    assert (base["loss"], personal["loss"]) == pytest.approx(((110 / 40 + 2) / 2, (2.0 + 1.8) / 2))
    assert (base["bleu"], personal["bleu"]) == pytest.approx((0.0, 100.0))
    assert (base["latency_ms_p50"], base["chrf"], base["intervals"]) == (20.0, None, {})
    won = personal["intervals"]["loss"]
    assert won["mean"] == pytest.approx((0.75 + 0.2) / 2)  # a lower loss is won, above 0
    assert won["low"] <= 0.2001 and won["high"] >= 0.7499  # two users tell little
    assert personal["intervals"]["bleu"]["mean"] == pytest.approx(100.0)


def test_a_row_is_one_user_and_its_interval_weighs_examples_by_tokens() -> None:
    scores = figures.scores(ARMS, LOSSES, metrics=["loss", "bleu"])
    rows = {(row["user"], row["arm"]): row for row in figures.rows_of(ARMS, scores, LOSSES, seed=0)}
    assert rows["ann", "base"]["interval"] is None
    own = rows["ann", "personal"]["interval"]
    assert own["mean"] == pytest.approx(30 / 40) and own["low"] <= 20 / 30 <= 1.0 <= own["high"]
    alone = rows["bob", "personal"]["interval"]  # an example without a token counts nothing
    assert (alone["mean"], alone["low"]) == (pytest.approx(0.2), None)
    assert rows["bob", "personal"]["latency_ms_p99"] == 30.0


def test_what_no_arm_can_do_is_about_zero_and_named() -> None:
    scores = figures.scores(ARMS, LOSSES, metrics=["exact_match", "bleu"])
    assert figures.about_zero(scores) == {}
    bad = figures.scores([measured("base", "x"), measured("personal", "y")], LOSSES, metrics=["bleu"])
    assert figures.about_zero(bad) == {"bleu": "about zero for every arm: the best, base, has 0"}


def test_pass_at_1_is_over_problems_and_so_is_its_interval() -> None:
    """Of 100 problems the arm solves 30 more than the base model, which solves 10 of them."""
    base = {f"HumanEval/{n}": n < 10 for n in range(100)}
    arms = [dataclasses.replace(measured("base", "x"), solved=base)]
    arms += [
        dataclasses.replace(measured("personal", "x"), solved={one: n < 40 for n, one in enumerate(base)})
    ]
    told = figures.arms_of(arms, figures.scores(arms, LOSSES, metrics=["pass_at_1"]), seed=0)
    assert [one["pass_at_1"] for one in told] == [0.1, 0.4]
    won = told[1]["intervals"]["pass_at_1"]
    assert won["mean"] == pytest.approx(0.3) and 0.2 < won["low"] < 0.25 and 0.35 < won["high"] < 0.4


def test_pass_at_1_of_three_problems_in_164_is_about_zero() -> None:
    for count, why in ((3, {"pass_at_1": "about zero for every arm: the best, base, has 0.0183"}), (4, {})):
        solved = {str(n): n < count for n in range(164)}
        arms = [dataclasses.replace(measured("base", "x"), solved=solved)]
        assert figures.about_zero(figures.scores(arms, LOSSES, metrics=["pass_at_1"])) == why


def test_the_table_has_what_was_measured_and_says_what_was_left_out() -> None:
    found = schema.check(comparison(), source="x")
    lines = table.text(found, users=True).splitlines()
    assert "bleu" in lines[0] and "codebleu" not in lines[0]  # a column without a figure is none
    assert any(line.startswith("residual@16") and "+0.500 (+0.100 to +0.900)" in line for line in lines)
    assert any(line.startswith("bob") for line in lines)
    assert lines[-1] == "left out: codebleu: not asked for"
    assert table.markdown_table(found).startswith("| arm | loss | bleu |")
