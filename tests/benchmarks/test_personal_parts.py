"""Users of a basis in two parts, each with a basis of its own, of which others choose one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import personal, personal_learnt, personal_parts
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
