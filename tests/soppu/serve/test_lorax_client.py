"""The real LoRAX client, in a process and an environment of its own, against our server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from soppu.targets.embedded import EmbeddedTarget
from tests.soppu.serve import tiny

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-lorax" / "bin" / "python"
PROMPT = "the quick"


@pytest.fixture(scope="module")
def client() -> Path:
    """The interpreter that has lorax-client 0.6.3."""
    if not PYTHON.exists():
        if os.environ.get("SOPPU_ALLOW_NO_LORAX_CLIENT") == "1":
            pytest.skip("no LoRAX client, and SOPPU_ALLOW_NO_LORAX_CLIENT=1")
        pytest.fail("the LoRAX client is not installed; run: sh tests/lorax_env.sh")
    return PYTHON


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What PEFT and generate give."""
    shared = _bundle()
    model = tiny.llama()
    return {
        who: tiny.peft_text(model, PROMPT, shared.reconstruct(who) if who else None, tokens=8)
        for who in ("alice", "bob", "")
    }


@pytest.fixture(scope="module")
def found(client: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lorax")
    bundle_id = _bundle().save(folder / "b.safetensors")
    with tiny.served(tiny.llama(), folder / "state") as url:
        target = EmbeddedTarget(url, admin_token=tiny.TOKEN)
        target.publish(folder / "b.safetensors", bundle_id=bundle_id)
        target.activate(bundle_id)
        command = [client, Path(__file__).with_name("lorax_calls.py"), url, PROMPT, "alice", "bob", ""]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _bundle() -> Any:
    model = tiny.llama()
    return tiny.bundle({"alice": tiny.lora(model, seed=1), "bob": tiny.lora(model, seed=2)})


def test_generate_gives_each_user_the_text_of_peft(found: Any, expected: dict[str, str]) -> None:
    assert found["generate"] == expected
    assert found["async"] == expected
    assert len(set(expected.values())) == 3


def test_the_stream_gives_the_same_text(found: Any, expected: dict[str, str]) -> None:
    for who, (joined, whole) in found["stream"].items():
        assert joined == whole == expected[who]


def test_the_client_parses_every_detail(found: Any) -> None:
    for details in found["details"].values():
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 8)
        assert len(details["tokens"]) == 8 and details["prompt_tokens"] > 0
        assert all(token["logprob"] < 0 for token in details["tokens"])


def test_the_client_raises_its_own_errors(found: Any) -> None:
    for way in ("generate", "stream"):
        assert "adapter 'nobody' is not served here" in found["errors"][way]
    assert "`max_new_tokens` must be <= 128" in found["errors"]["validation"]
