"""Shared rounds end when both losses have stalled, not before, and not by a round that told nothing."""

from __future__ import annotations

from typing import Any

import pytest

from server.patience import is_over

FALLING, FLAT = [3.0, 2.5, 2.2, 2.1, 2.05], [3.0, 2.5, 2.5, 2.6, 2.5]


def rounds(users: list[float], public: list[float], *, told: bool = True) -> list[dict[str, Any]]:
    accepted = ["alice"] if told else []
    pairs = zip(users, public, strict=True)
    return [{"shared_loss": user, "public_loss": of_all, "accepted": accepted} for user, of_all in pairs]


@pytest.mark.parametrize(
    ("users", "public", "over"),
    [(FALLING, FALLING, False), (FALLING, FLAT, False), (FLAT, FALLING, False), (FLAT, FLAT, True)],
)
def test_rounds_are_over_when_both_have_stalled(users: list[float], public: list[float], over: bool) -> None:
    assert is_over(rounds(users, public), 2) is over


def test_a_longer_patience_waits_longer() -> None:
    assert [is_over(rounds(FLAT, FLAT), patience) for patience in (1, 2, 3, 4, 5)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_nothing_is_over_before_it_began() -> None:
    assert not is_over([], 1)
    assert not is_over(rounds([2.0], [2.0]), 1)


def test_a_round_in_which_nobody_was_accepted_tells_nothing() -> None:
    silent = rounds([0.0, 0.0], [0.0, 0.0], told=False)
    assert not is_over([*rounds([3.0, 2.0], [3.0, 2.0]), *silent], 2)


def test_a_loss_that_is_not_a_number_does_not_count_as_better() -> None:
    assert is_over(rounds([3.0, 2.0, float("nan"), 2.0], [3.0, 2.0, 2.0, 2.0]), 2)
