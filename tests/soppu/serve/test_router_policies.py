"""Policies against slow references, cross-validation that cannot leak, and a file that says what it is of."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soppu.errors import RouterError
from soppu.serve.router import crossed, policies
from soppu.serve.router import file as files
from soppu.serve.router.measured import Measured
from soppu.serve.router.policies import ORACLE, Length, Neighbours, Options
from tests.soppu.serve import routing

OPTIONS = Options(routing.ARMS, neighbours=3)


def test_neighbours_are_those_of_a_plain_search() -> None:
    known, asked = routing.measured(), routing.measured(6, users=("alice", "new"), seed=1).asked
    found = Neighbours(known, 3).expect(asked)
    middle, spread = known.asked.vectors.mean(0), known.asked.vectors.std(0)
    for row, user in enumerate(asked.users):
        pool = [n for n, own in enumerate(known.asked.users) if own == user or user == "new"]
        query = (asked.vectors[row] - middle) / spread

        def alike(n: int, query: np.ndarray = query) -> float:
            other = (known.asked.vectors[n] - middle) / spread
            return float(query @ other / np.linalg.norm(query) / np.linalg.norm(other))

        near = sorted(pool, key=alike, reverse=True)[:3]
        expected = sum(known.losses[n] for n in near) / sum(known.tokens[n] for n in near)
        assert found[row] == pytest.approx(expected)


def test_the_edge_of_the_length_rule_is_the_best_there_is() -> None:
    known = routing.measured()
    rule = Length.of(known)
    chosen = rule.expect(known.asked).argmin(1)
    summed = known.losses[np.arange(len(known)), chosen].sum()
    lengths = known.asked.lengths
    tried = [
        known.losses[lengths < edge, short].sum() + known.losses[lengths >= edge, long].sum()
        for edge in range(50)
        for short in (0, 1)
        for long in (0, 1)
    ]
    assert summed == pytest.approx(min(tried))


def test_the_cheapest_arm_within_the_tolerance_is_chosen() -> None:
    expected = np.array([[2.0, 1.995], [2.0, 1.98], [1.0, 2.0]])
    assert policies.choose(expected, OPTIONS).tolist() == [0, 1, 0]
    assert policies.choose(expected, replace(OPTIONS, tolerance=0.0)).tolist() == [1, 1, 0]


def test_equal_prompts_are_in_one_fold_whoever_asked() -> None:
    known = routing.measured()
    fold = crossed.folds(known.digests, count=5, seed=0)
    assert all(fold[n] == fold[n + 1] for n in range(0, 8, 2)) and len(set(fold.tolist())) == 5


@pytest.mark.parametrize("name", policies.names([arm.name for arm in routing.ARMS]))
def test_what_a_prompt_is_judged_by_does_not_know_its_losses(name: str) -> None:
    """Losses of a fold are turned round: what is chosen there stays, for any policy that does not leak."""
    known = routing.measured(60)
    fold = crossed.folds(known.digests, count=5, seed=0)
    before = crossed.choices(known, OPTIONS)
    turned = known.losses.copy()
    turned[fold == 0] = turned[fold == 0][:, ::-1] * 9
    prior = {user: (9.0, 0.0) for user in known.asked.users}  # which was measured on the same prompts
    told = replace(OPTIONS, prior=prior)
    after = crossed.choices(Measured(known.asked, known.digests, known.tokens, turned), told)
    assert (before[name][fold == 0] == after[name][fold == 0]).all()
    assert not (before[ORACLE][fold == 0] == after[ORACLE][fold == 0]).any()


def test_a_file_comes_back_as_it_was_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    found, path = routing.router("c" * 64), tmp_path / "router.json"
    name = files.write(path, found)
    read = files.read(path)
    assert read.id == name and read.bundle_id == found.bundle_id and read.base_hash == found.base_hash
    assert np.allclose(read.measured.asked.vectors, found.measured.asked.vectors, atol=1e-6)
    values = json.loads(path.read_text())
    values["bundle_id"] = "d" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(RouterError, match="its content has 'r-.*changed; fit it again"):
        files.read(path)
    with pytest.raises(RouterError, match="no such file; make it with `soppu router fit"):
        files.read(tmp_path / "absent")


def changed(values: dict[str, Any], where: str, value: object) -> None:
    """Put a value at a place of the file, and give the whole the id of its new content."""
    *path, last = where.split(".")
    holder: Any = values
    for part in path:
        holder = holder[int(part) if part.isdigit() else part]
    holder[int(last) if last.isdigit() else last] = value
    values["id"] = files._digest(values)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("format", 2, "format 2, allowed: 1"),
        ("layer", 0, "layer: Input should be greater than or equal to 1"),
        ("policy", "best", "policy 'best', allowed: personal, base, gain"),
        ("policy", "cheaper", "policy 'cheaper', allowed: personal, base, gain"),
        ("arms.0.name", "personal", "arms are personal, personal, allowed: base, personal, and others"),
        ("prompts.3.losses", [1.0], "has not one number for each of 2 arms"),
        ("prior.alice", [1.0, 2.0, 3.0], "has not one number for each of 2 arms"),
        ("prompts.0.losses.1", "much", "prompts.0.losses.1: Input should be a valid number"),
        ("prompts", [], "prompts: List should have at least 1 item"),
        ("prompts.2.vector", "AAAA", "buffer size must be a multiple of element size"),
        ("prompts.2.vector", "AAAAAA==", "vectors of prompts differ in width"),
        ("prompts.2.vector", base64.b64encode(b"\xff" * 128).decode(), "vector of a prompt is not finite"),
        ("colour", "red", "colour: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(
    tmp_path: Path, where: str, value: object, said: str
) -> None:
    path = tmp_path / "router.json"
    files.write(path, routing.router("c" * 64))
    values = json.loads(path.read_text())
    changed(values, where, value)
    path.write_text(json.dumps(values))
    with pytest.raises(RouterError) as refused:
        files.read(path)
    assert said in str(refused.value) and str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).endswith("fit it again with `soppu router fit`")
