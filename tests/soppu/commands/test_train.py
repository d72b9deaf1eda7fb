"""`soppu train` as a command: what it prints of a training that was done before, too, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from soppu.cli import main
from soppu.stages.centralised import FILE
from soppu.stages.run import open_run, prepare
from tests.soppu.stages.conftest import three_users


@pytest.fixture(autouse=True)
def _as_if_started_now() -> Iterator[None]:
    """Accelerate remembers how many processes there are; a fork would believe it too."""
    yield
    AcceleratorState._reset_state(True)


def test_it_says_what_everybody_gains_and_trains_once(tiny_base: Path, tmp_path: Path) -> None:
    run = open_run(prepare(str(three_users(tmp_path, tiny_base))))
    words = ["train", str(run.folder), "--steps", "2", "--check-every", "1", "--batch", "2", "--layers", "1"]
    words += ["--learning-rate", "0.01", "--device", "cpu"]
    first = CliRunner().invoke(main, words)
    assert first.exit_code == 0, first.output
    told, lines = run.read(FILE), first.stdout.splitlines()
    assert lines[0].split() == ["USER", "BASE", "CENTRALISED", "GAIN"]
    for line, (user, loss) in zip(lines[1:4], told["losses"].items(), strict=True):
        base = told["base_losses"][user]
        assert line.split() == [user, f"{base:.3f}", f"{loss:.3f}", f"{base - loss:+.3f}"]
    assert f"adapter      {told['adapter_id']} in {run.folder / told['path']}" in lines
    assert "training: step 1, loss" in first.stderr and "evaluating: ann" in first.stderr
    again = CliRunner().invoke(main, words)
    assert again.stdout == first.stdout and "training" not in again.stderr


@pytest.mark.parametrize("layers", ["0", "-1", "some"])
def test_layers_are_the_run_s_all_or_a_number(layers: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["train", str(tmp_path), "--layers", layers])
    assert refused.exit_code == 2 and f"'{layers}', allowed: run, all, or a number" in refused.stderr
