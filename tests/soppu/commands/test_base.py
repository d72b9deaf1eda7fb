"""Plain PEFT folders, that say no hash, all the way to a served text; and `--base`, which gives them one."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, PreTrainedModel

from soppu import adapter, files, models
from soppu.adapter import LoraAdapter
from soppu.cli import main
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError
from soppu.models import BaseModel
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

USERS = ("ann", "bob")
PROMPT = "def main():"
HALF = ("--max-error", 0.5)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    tiny.base(folder)
    return models.resolve(str(folder), cache=folder)


@pytest.fixture
def model(base: BaseModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base.path).eval()


def plain(made: LoraAdapter, folder: Path, name: str | None = "org/tiny-llama") -> Path:
    """A folder as another tool leaves it: no soppu.json, and the base model by a name of its own."""
    adapter.write(made, folder)
    (folder / adapter.IDENTITY_FILE).unlink()
    config = json.loads((folder / adapter.CONFIG_FILE).read_text())
    (folder / adapter.CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return folder


@pytest.fixture
def folders(model: PreTrainedModel, tmp_path: Path) -> list[Path]:
    return [plain(tiny.lora(model, seed=n), tmp_path / "users" / user) for n, user in enumerate(USERS)]


def stage(base: BaseModel, model: PreTrainedModel, path: Path) -> AdapterBank:
    bank = AdapterBank(model, base_hash=base.hash, base_model=base.name)
    bank.stage(Bundle.load(path), bundle_id="1" * 64)
    return bank


def test_a_bundle_of_plain_folders_is_served_on_its_own_base_as_peft_does(
    base: BaseModel, folders: list[Path], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    out = tmp_path / "b.soppu"
    result = run("compress", *folders, "--max-error", 1e-4, "--out", out)
    assert result.exit_code == 0, result.output
    assert Bundle.load(out).base_hash == ""
    model = AutoModelForCausalLM.from_pretrained(base.path).eval()
    expected = [
        tiny.peft_text(model, PROMPT, made, tokens=12) for made in (*map(adapter.read, folders), None)
    ]
    bank = AdapterBank(model, base_hash=base.hash, base_model=base.name)
    state = ServerState.open(tmp_path / "state", bank)
    engine = Engine(model, tiny.tokenizer(), bank, EngineOptions())
    try:
        app = create_app(engine, info=ServerInfo(base.name, base.hash, admin_token="secret"), state=state)
        token = {"authorization": "Bearer secret"}
        with tiny.listening(app) as url, httpx.Client(base_url=url, timeout=60, headers=token) as client:
            bundle_id = files.sha256_file(out)
            put = client.put(f"/soppu/v1/bundles/{bundle_id}", content=out.read_bytes())
            assert put.status_code in (200, 201), put.text
            state.activate(bundle_id)
            found = []
            for user in (*USERS, ""):
                asked = {"inputs": PROMPT, "parameters": {"adapter_id": user, "max_new_tokens": 12}}
                found.append(client.post("/generate", json=asked).json()["generated_text"])
    finally:
        state.close()
    assert found == expected and len(set(found)) == 3


@pytest.mark.parametrize(
    "name", ["org/another", *(pytest.param(n, marks=pytest.mark.long) for n in ("", None))]
)
def test_base_gives_folders_of_another_name_or_none_the_hash(
    base: BaseModel, model: PreTrainedModel, tmp_path: Path, name: str | None
) -> None:
    folders = [plain(tiny.lora(model, seed=n), tmp_path / user, name) for n, user in enumerate(USERS)]
    out = tmp_path / "b.soppu"
    result = run("compress", *folders, *HALF, "--out", out)
    assert result.exit_code == 0 and "--base MODEL writes its hash" in result.stderr
    with pytest.raises(BundleError, match="--base MODEL"):
        stage(base, model, out)
    result = run("compress", *folders, *HALF, "--base", base.path, "--out", out)
    assert result.exit_code == 0 and "writes its hash" not in result.stderr
    assert Bundle.load(out).base == base.base
    assert stage(base, model, out).bundles() == {"1" * 64: USERS}


def test_base_is_held_against_the_hash_and_the_shapes_of_every_folder(
    base: BaseModel, model: PreTrainedModel, folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "b.soppu"
    adapter.write(tiny.lora(model, seed=3), tmp_path / "known")
    other = plain(tiny.lora(tiny.gpt2(), seed=4), tmp_path / "gpt2")
    for folder, words in (
        (tmp_path / "known", "made for base model bbbbbbbbbbbb"),
        (other, "no such module"),
    ):
        result = run("compress", *folders, folder, "--base", base.path, "--out", out)
        assert result.exit_code == 1 and words in result.output and str(folder) in result.output
    result = run("compress", *folders, "--base", tmp_path / "nothing", "--out", out)
    assert result.exit_code == 1 and "nothing" in result.output and not out.exists()


def test_project_takes_a_newcomer_of_the_same_name_and_base_one_of_another(
    base: BaseModel, model: PreTrainedModel, folders: list[Path], tmp_path: Path
) -> None:
    out, new = tmp_path / "b.soppu", tmp_path / "new.soppu"
    assert run("compress", *folders, *HALF, "--base", base.path, "--out", out).exit_code == 0
    same = plain(tiny.lora(model, seed=7), tmp_path / "same")
    other = plain(tiny.lora(model, seed=8), tmp_path / "other", "org/another")
    words = ("--max-error", 0.9, "--out", new)
    assert run("project", out, f"cem={same}", *words).exit_code == 0
    refused = run("project", out, f"dora={other}", *words)
    assert refused.exit_code == 1 and "made for base model unknown (org/another)" in refused.output
    assert "--base MODEL" in refused.output
    assert run("project", out, f"dora={other}", *words, "--base", base.path).exit_code == 0
    assert Bundle.load(new).users == (*USERS, "dora") and Bundle.load(new).base == base.base
