"""A new user joins a run that a real vLLM server serves: by the run, and at the server itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.stages.join import Newcomer, join
from soppu.stages.run import Run
from soppu.stages.targets import open_target
from soppu.targets.vllm import VllmTarget
from tests.soppu.serve.vllm_plugin import live
from tests.soppu.stages.joiners import LENIENT, QUICK, a_fleet, bundle_of, text_of
from tests.soppu.stages.test_publish_vllm import MEMORY
from tests.soppu.stages.test_stages import WAVE_THROUGH

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.vllm]


@pytest.fixture
def overrides(tmp_path: Path) -> dict[str, object]:
    """The base model that vLLM can run, and a vLLM server that the first publication starts."""
    live.require()
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(f'{{"text": "everybody says {n}"}}' for n in range(20)))
    gate = {f"gate.{name}": value for name, value in WAVE_THROUGH.items()}
    return {
        **(QUICK | LENIENT | gate),
        "align.source": str(public),
        "base.model": "smollm2-135m",
        "base.cache": str(live.ROOT / ".soppu" / "models"),
        "serve.target": "vllm",
        "serve.vllm_python": str(live.PYTHON),
        "serve.vllm_options": list(MEMORY),
        "serve.start_timeout_s": 1500,
    }


def test_a_user_joins_a_run_whose_target_is_vllm(run: Run, trained: dict[str, str], tmp_path: Path) -> None:
    fleet, folder = a_fleet(run, trained), str(run.folder)
    first = join(folder, Newcomer("dora", str(text_of("dora", tmp_path))))
    target = open_target(run)
    assert isinstance(target, VllmTarget) and target.active() == first.bundle_id and first.before == fleet
    assert first.first_token and set(target.bundles()) == {fleet, first.bundle_id}
    words = ["join", "eve", "--data", str(text_of("eve", tmp_path)), "--url", run.config.serve.url]
    words += ["--config", str(run.folder / "config.toml"), "--state", run.config.serve.state]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "client")])
    assert done.exit_code == 0, done.output
    taken = CliRunner().invoke(main, ["admit", "--run", folder])
    assert taken.exit_code == 0 and "eve" in taken.output
    assert bundle_of(run, target.active()).users == ("ann", "bob", "cleo", "dora", "eve")
    assert run.registry().live(run.config.serve.url) == target.active()
