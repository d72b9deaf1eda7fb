"""Checkpoints: whole, of this run, or not used."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from server import checkpoint as checkpoints
from server.checkpoint import WARM_UP, Checkpoint, RoundShare
from soppu.config import FederationConfig
from soppu.errors import StorageError


def make(key: str = "run", *, done: int = 1, value: float = 1.0) -> Checkpoint:
    tensors = {"a.lora_A.weight": torch.full((2, 3), value), "b.lora_B.weight": torch.ones(4, 2).T}
    aligner = {"b.lora_B.weight": torch.ones(5, 2).T, "b.lora_B.weight/step": torch.tensor(3.0)}
    notes = {"rounds": [{"round": done, "refused": {}}], "align": {"after": 0.25}}
    return Checkpoint(key, done, tensors, notes, aligner)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.key, one.done, one.notes) == (other.key, other.done, other.notes) and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in ((one.tensors, other.tensors), (one.aligner, other.aligner))
    )


def test_nothing_there_is_an_empty_checkpoint(tmp_path: Path) -> None:
    assert same(checkpoints.load(tmp_path / "absent", key="run"), Checkpoint("run", -1))


def test_there_and_back(tmp_path: Path) -> None:
    checkpoints.store(tmp_path, make())
    assert same(checkpoints.load(tmp_path, key="run"), make())


def test_another_runs_checkpoint_is_not_used(tmp_path: Path) -> None:
    checkpoints.store(tmp_path, make())
    assert same(checkpoints.load(tmp_path, key="other"), Checkpoint("other", -1))


def test_only_the_newest_tensors_stay(tmp_path: Path) -> None:
    for done in (0, 1, 2, 10):
        checkpoints.store(tmp_path, make(done=done, value=done))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["round-0010.safetensors"]
    assert same(checkpoints.load(tmp_path, key="run"), make(done=10, value=10))


def test_a_disk_that_fills_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints.store(tmp_path, make(done=1))
    big = make(done=2)
    big.tensors["a.lora_A.weight"] = torch.zeros(100, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError):
            checkpoints.store(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(checkpoints.load(tmp_path, key="run"), make(done=1))


def test_killed_between_tensors_and_json_the_one_before_is_used(tmp_path: Path) -> None:
    checkpoints.store(tmp_path, make(done=1))
    (tmp_path / "round-0002.safetensors").write_bytes(b"half a file")
    assert same(checkpoints.load(tmp_path, key="run"), make(done=1))


def test_progress_is_json_for_whoever_polls(tmp_path: Path) -> None:
    checkpoints.write_progress(tmp_path, {"note": "round 1 of 3", "share": 0.5})
    assert json.loads((tmp_path / "progress.json").read_text()) == {"note": "round 1 of 3", "share": 0.5}


@pytest.mark.parametrize("rates", [(0.001,), (0.001, 0.002, 0.004)])
@pytest.mark.parametrize("last", [1, 2, 5])
def test_rounds_share_what_follows_the_warm_up_by_the_steps_users_may_train(
    last: int, rates: tuple[float, ...]
) -> None:
    settings = FederationConfig(local_steps=10, personal_steps=40, personal_learning_rates=rates)
    rounds = [RoundShare.of(number, last, settings) for number in range(1, last + 1)]
    assert rounds[0].share(0.0) == pytest.approx(WARM_UP) and rounds[-1].share(1.0) == pytest.approx(1.0)
    for one, two in zip(rounds, rounds[1:], strict=False):
        assert one.share(1.0) == pytest.approx(two.share(0.0))
        assert one.share(0.0) < one.share(0.5) < one.share(1.0)
    if last > 1:
        assert rounds[-1].whole / rounds[0].whole == pytest.approx(4 * len(rates))
