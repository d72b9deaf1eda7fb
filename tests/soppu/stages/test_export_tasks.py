"""Held-out text for lm-eval: what is written gives the gate's own losses, by other people's code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from soppu.cli import main
from soppu.data import IGNORE, Block
from soppu.errors import ConfigError
from soppu.evaluate.tradeoff import lm_eval
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.export_tasks import OURS, Exported, export_tasks
from soppu.stages.federate import freeze_current
from soppu.stages.run import Run
from tests.soppu.stages.conftest import write_result


@pytest.fixture
def exported(run: Run, trained: dict[str, str], tmp_path: Path) -> Exported:
    """Of a run that the gate has measured."""
    write_result(run, trained)
    set_id = freeze_current(str(run.folder))
    evaluate(str(run.folder), set_id, compress_set(str(run.folder), set_id))
    return export_tasks(str(run.folder), tmp_path / "out")


def recomputed(exported: Exported, folder: Path, user: str, *, adapter: bool) -> float:
    """Nats a token, from the files alone: the tokenizer's ids, one document at a time."""
    words = AutoTokenizer.from_pretrained(folder / lm_eval.TOKENS)
    model = AutoModelForCausalLM.from_pretrained(exported.model)
    if adapter:
        model = PeftModel.from_pretrained(model, str(exported.adapters[user]))
    score = importlib.util.spec_from_file_location("score", folder / lm_eval.TASKS / lm_eval.SCORE)
    assert score and score.loader
    module = importlib.util.module_from_spec(score)
    score.loader.exec_module(module)
    items = []
    for line in (folder / lm_eval.TASKS / f"{exported.tasks[user]}.jsonl").read_text().splitlines():
        doc = json.loads(line)
        before, ids = (words(text)["input_ids"] for text in (doc["context"], doc["context"] + doc["target"]))
        assert len(ids) - len(before) == doc["tokens"] and ids[: len(before)] == before
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        likelihood = sum(float(chances[at - 1, ids[at]]) for at in range(len(before), len(ids)))
        items.append(module.one(doc, [(likelihood, False)])[lm_eval.METRIC])
    return float(module.nats_per_token(items))


def test_the_files_give_the_gates_losses_by_transformers_and_peft(exported: Exported, tmp_path: Path) -> None:
    ours = json.loads((tmp_path / "out" / OURS).read_text())
    assert ours.keys() == exported.tasks.keys() == exported.adapters.keys() == {"ann", "bob", "cleo"}
    assert ours["bob"]["personal"] < ours["bob"]["base"] - 0.1
    for adapter, column in ((False, "base"), (True, "personal")):
        found = recomputed(exported, tmp_path / "out", "bob", adapter=adapter)
        assert found == pytest.approx(ours["bob"][column], abs=1e-4)


def test_the_command_says_what_was_measured_and_how_lm_eval_is_called(
    run: Run, trained: dict[str, str], tmp_path: Path
) -> None:
    write_result(run, trained)
    result = CliRunner().invoke(main, ["export-tasks", str(run.folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    assert f"peft={tmp_path}/out/adapters/ann,tokenizer={tmp_path}/out/tokenizer" in last
    assert "soppu_ann" in last and " - " in result.output  # nothing was evaluated yet
    with pytest.raises(ConfigError, match="is not empty"):
        export_tasks(str(run.folder), tmp_path / "out")


def test_every_learned_token_that_follows_from_something_is_asked_for_once() -> None:
    ids, off = torch.arange(10, 18), IGNORE
    labels = torch.tensor([10, 11, off, off, 14, 15, off, 17])
    found = list(lm_eval.documents([Block(ids, labels)]))
    assert [(one["context"], one["target"]) for one in found] == [
        ("<10>", " <11>"),
        ("<10> <11> <12> <13>", " <14> <15>"),
        ("<10> <11> <12> <13> <14> <15> <16>", " <17>"),
    ]
    assert [one["tokens"] for one in found] == [1, 2, 1]


def lm_eval_python() -> str:
    """Of an environment that has lm-eval: LM_EVAL_PYTHON, or our own."""
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lm_eval"], capture_output=True, check=False).returncode:
        pytest.skip("lm-eval is not installed; LM_EVAL_PYTHON names the Python of an environment that has it")
    return python


@pytest.mark.long
def test_lm_eval_itself_finds_the_gates_losses(exported: Exported, tmp_path: Path) -> None:
    python, folder = lm_eval_python(), tmp_path / "out"
    ours = json.loads((folder / OURS).read_text())
    for adapter, column in ((None, "base"), (exported.adapters["bob"], "personal")):
        task = exported.tasks["bob"]
        _, *words = lm_eval.command(folder, [task], model=exported.model, adapter=adapter)
        place = tmp_path / column
        code = [python, "-m", "lm_eval", *words, "--output_path", str(place)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(code, check=True, capture_output=True, env=offline, timeout=300)
        (told,) = place.rglob("results*.json")
        found = json.loads(told.read_text())["results"][task][f"{lm_eval.METRIC},none"]
        assert found == pytest.approx(ours["bob"][column], abs=1e-4)
