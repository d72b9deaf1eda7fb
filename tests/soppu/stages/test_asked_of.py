"""Whom a publication asks a canary of."""

from __future__ import annotations

import pytest

from soppu.stages.publish import SAMPLES, asked_of


@pytest.mark.parametrize("n", [1, 2, SAMPLES, SAMPLES + 1, SAMPLES + 2, 10 * SAMPLES + 7])
def test_who_has_changed_is_asked_first_and_of_the_others_a_bounded_part_from_end_to_end(n: int) -> None:
    users = tuple(f"user-{number:05}" for number in range(n))
    assert asked_of(users, ()) == users
    first, *others = asked_of(users, (users[-1],))
    assert first == users[-1] and others == sorted(set(others)) and users[-1] not in others
    assert len(others) == n - 1 if n <= SAMPLES + 1 else SAMPLES / 2 <= len(others) <= SAMPLES
    step = -(-(n - 1) // SAMPLES)
    assert not others or (others[0] == users[0] and n - 1 - users.index(others[-1]) <= step)
