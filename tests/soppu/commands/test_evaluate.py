"""`soppu evaluate` where it cannot compare: one sentence, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.stages.run import prepare
from tests.soppu.stages.conftest import three_users


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> str:
    """A run that was prepared, and nothing more."""
    return prepare(str(three_users(tmp_path_factory.mktemp("run"), tiny_base)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "holds no evaluation"),
        ("--metric taste", "taste"),
        ("--prompts 0", "prompts"),
        ("--max-new-tokens 0", "max_new_tokens"),
        ("--batch -1", "batch"),
    ],
)
def test_what_cannot_be_compared_is_told(run: str, words: str, said: str) -> None:
    before = sorted(path.name for path in Path(run).iterdir())
    done = CliRunner().invoke(main, ["evaluate", run, *words.split()])
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("Error: ") and said in line
    assert sorted(path.name for path in Path(run).iterdir()) == before
