"""Warming up: once for the same settings, anew for others, and with public text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.federation import Federation
from soppu import config as configuration
from soppu import data
from soppu.errors import FederationError
from tests.server.grid import InProcessGrid
from tests.server.small_run import NODES, Build, config
from tests.thorough import thorough

__all__ = ["config"]
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


def test_warming_up_is_not_done_twice(config: Build, tmp_path: Path) -> None:
    first = Federation(config(), tmp_path / "work")
    first.warm_up()
    second = Federation(config(), tmp_path / "work")
    second.warm_up()
    assert second.state.done == 0
    assert second.state.notes == first.state.notes
    assert second.aligner.adapter().content_hash() == first.aligner.adapter().content_hash()
    ours, theirs = first.aligner.state(), second.aligner.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"alpha": 8}},
        {"federation": {"wire": "ternary"}},
        *thorough(
            {"plan": {"drop_ratio": 0.2}},
            {"federation": {"local_steps": 3}},
            {"data": {"max_tokens": 40}},
            {"align": {"kl_weight": 0.0}},
        ),
    ],
    ids=["lora", "wire", "plan", "federation", "data", "align"],
)
def test_a_checkpoint_of_other_settings_is_not_used(
    config: Build, tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    Federation(config(), tmp_path / "work").warm_up()
    assert Federation(config(), tmp_path / "work").state.done == 0
    assert Federation(config(**changes), tmp_path / "work").state.done == -1


@pytest.mark.parametrize("changes", [{"seed": 1}, {"frozen_dtype": "bfloat16"}])
def test_seed_and_precision_are_settings_too(config: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    federation = Federation(config(), tmp_path / "work")
    federation.warm_up()
    assert Federation(config(), tmp_path / "work").state.done == 0
    other = configuration.from_dict(configuration.to_dict(config()) | changes)
    assert Federation(other, tmp_path / "work").state.done == -1


def test_what_is_served_later_does_not_change_the_federation(config: Build, tmp_path: Path) -> None:
    federation = Federation(config(), tmp_path / "work")
    federation.warm_up()
    later = config(serve={"max_batch": 2}, compress={"rank": 4}, gate={"min_mean_gain_kept": 0.1})
    assert Federation(later, tmp_path / "work").state.done == 0


def test_the_server_reads_public_text_only(config: Build, tmp_path: Path) -> None:
    """With the users' files gone before the server starts, it gets as far as asking them."""
    run = config()
    for path in (tmp_path / "users").iterdir():
        path.unlink()
    federation = Federation(run, tmp_path / "work")
    federation.warm_up()
    public = data.load_public(run.align.source, limit=99)
    assert len(federation._public) + len(federation._unseen) == len(public) == 5
    assert federation._public and federation._unseen  # what it trains on, and what it measures with
    with pytest.raises(FederationError, match="0 users can train"):
        federation.run(InProcessGrid(NODES))
