"""Users of a basis in two parts, each with a basis of its own, of which others choose one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import personal, personal_learnt, personal_page, personal_parts
from benchmarks.personal_arms import BASE, FULL, SHARED, Arm
from benchmarks.personal_ground import Ground


def test_rows_that_are_alike_come_into_one_half() -> None:
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 40, generator=draw)
    which = torch.tensor([0, 1, 1, 0, 1, 0])
    told = kinds[which] + 0.1 * torch.randn(6, 40, generator=draw)
    found = personal_parts.halves(told)
    assert sorted(found) == [[0, 3, 5], [1, 2, 4]]
    turned = personal_parts.halves(-3 * told)  # neither sign nor length of them all decides
    assert sorted(turned) == sorted(found)


def test_everybody_keeps_the_basis_that_is_better_on_their_own_validation_text(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"rounds": 2, "episode": 1, "steps": 2, "rate": 5e-3, "core_rate": 0.06}
    monkeypatch.setattr(personal_learnt, "ROUNDS", rounds)
    monkeypatch.setattr(personal_learnt, "_MARKS", (1,))
    monkeypatch.setattr(personal_parts, "K", 4)
    personal.study(ground, [Arm(BASE), Arm(SHARED), Arm(FULL)], {"commit": ""})
    alike = personal_parts.measured(personal_parts.ALIKE, ground, 3)
    drawn = personal_parts.measured(personal_parts.DRAWN, ground, 3)
    personal.add(alike, ground, {"commit": ""}, among="parts")
    personal.add(drawn, ground, {"commit": ""}, among="parts")
    for row, there in zip((alike, drawn), personal.stored()["parts"], strict=True):
        assert there["losses"] == row["losses"] and there["arm"] == row["arm"]
        assert sorted(row["users_of_each"]) == [1, 2] and set(row["choice"].values()) <= {0, 1}
        assert min(row["mean_of_each"]) >= row["mean_of_better"] and row["mean"] >= row["mean_of_better"]


def test_two_bases_stand_beside_one_of_as_many_users_or_of_the_nearest_fewer() -> None:
    place = {"corpus": "stdlib", "arm": "federated basis", "k": 4, "own": 0, "modules": ["down_proj"]}
    ones = [
        {**place, "basis_users": users, "losses": {"ann": loss, "bob": loss}}
        for users, loss in ((12, 4.0), (24, 3.0), (48, 2.0))
    ]
    parts = {
        **place,
        "arm": personal_parts.ALIKE,
        "own": None,
        "basis_users": 24,
        "users_of_each": [12, 12],
        "mean": 1.0,
        "losses": {"ann": 1.0, "bob": 1.0},
        "choice": {"ann": 0, "bob": 1},
        "mean_of_each": [1.5, 1.6],
        "mean_of_better": 0.9,
    }
    told = personal_page.in_parts([parts], ones)
    assert "+2.0000 (+2.0000 to +2.0000), of 24 users" in told and "1 of 2" in told
    assert "of 12 users" in personal_page.in_parts([{**parts, "basis_users": 20}], ones)
    assert personal_page.in_parts([], ones) == ""
