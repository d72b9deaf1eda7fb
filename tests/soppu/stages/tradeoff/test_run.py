"""The comparison of a real run's arms, and the gate's rules on it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import codebleu
import pytest
import sacrebleu
import torch
from click.testing import CliRunner

from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cli import main
from soppu.data import load_user, tokenize
from soppu.data.tokens import IGNORE
from soppu.errors import ConfigError, GateError, SandboxError, SoppuError
from soppu.evaluate.losses import UserLosses
from soppu.evaluate.tradeoff import figures, human_eval, sandbox_child, schema, table
from soppu.federation.attach import attached
from soppu.federation.personalise import BASE
from soppu.models import linear_shapes
from soppu.stages import compress, federate
from soppu.stages.centralised import identify
from soppu.stages.evaluate import evaluate
from soppu.stages.publish import publish
from soppu.stages.run import Run, open_run, prepare
from soppu.stages.tradeoff import judge, losses, solve
from soppu.stages.tradeoff.arms import Arm
from soppu.stages.tradeoff.generate import here
from soppu.stages.tradeoff.job import Done, Job
from soppu.stages.tradeoff.judge import tradeoff
from soppu.stages.tradeoff.run import Measuring, compare
from soppu.tradeoff_settings import EvaluateConfig
from tests.soppu.stages.conftest import USERS, write_result

ARMS = ("shared", "personal", "joint@4", "residual@4")
OPTIONS = EvaluateConfig(arms=ARMS, prompts=2, max_new_tokens=6, batch=4)


@pytest.fixture
def overrides(tmp_path: Path) -> dict[str, object]:
    """Users who write functions, in a small file each; compression to a ratio."""
    source = tmp_path / "functions"
    source.mkdir()
    for user in USERS:
        lines = [
            {
                "user_id": user,
                "prompt": f"def {user}_{n}(x):\n",
                "completion": f"    y = x + {n}\n    return y\n",
            }
            for n in range(14)
        ]
        (source / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "data.source": str(source),
        "compress.ratio": 4.0,
        "compress.basis_bits": 8,
        "compress.core_bits": 8,
    }


@pytest.fixture
def judged(run: Run, trained: dict[str, str]) -> tuple[Run, str, str]:
    """A run whose gate has spoken: itself, its bundle and its evaluation. Cleo is served the base model."""
    write_result(run, trained, cleo=BASE)
    set_id = federate.collect(str(run.folder), federate.federate(str(run.folder)))
    bundle_id = compress.compress_set(str(run.folder), set_id)
    return run, bundle_id, evaluate(str(run.folder), set_id, bundle_id)


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done before")


def test_arms_are_measured_once_and_as_the_gate_and_the_libraries_do(
    judged: tuple[Run, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, bundle_id, evaluation = judged
    monkeypatch.setattr(
        figures, "about_zero", lambda scores: {}
    )  # a tiny model writes nothing like its users
    path = compare(str(run.folder), options=OPTIONS, how=Measuring(process=here))
    found = schema.read(path)
    assert [arm.name for arm in found.arms] == ["base", *ARMS]
    assert (run.folder / schema.FILE).resolve() == path.resolve()
    gate = {one["user"]: UserLosses.from_dict(one) for one in run.read(evaluation)["losses"]}
    rows = {(row.user, row.arm): row for row in found.rows}
    assert {user for user, _ in rows} == set(USERS)
    for user, one in gate.items():
        ours = [rows[user, arm].loss for arm in ("base", "shared", "personal", "joint@4")]
        assert ours == [one.base, one.shared, one.personal, one.compressed]
    assert rows["cleo", "joint@4"].loss == rows["cleo", "base"].loss and rows["cleo", "joint@4"].bytes == 0
    arms = {arm.name: arm for arm in found.arms}
    assert arms["joint@4"].bundle_id == bundle_id  # the run's own compression is that arm
    assert arms["residual@4"].bytes == run.registry().bundle_bytes(arms["residual@4"].bundle_id or "")
    lines = [json.loads(line) for line in (run.folder / found.texts).read_text().splitlines()]
    assert len(lines) == sum(min(2, one.examples) for one in gate.values())
    for (user, arm), row in rows.items():
        texts = [line["texts"][arm] for line in lines if line["user"] == user]
        written = [line["reference"] for line in lines if line["user"] == user]
        whole = codebleu.calc_codebleu([[one] for one in written], texts, lang="python")["codebleu"]
        assert row.bleu == sacrebleu.corpus_bleu(texts, [written]).score
        assert row.codebleu == pytest.approx(100 * whole, rel=1e-12)
    assert all(arm.tokens_s and arm.memory_bytes and arm.latency_ms_p99 for arm in found.arms)
    monkeypatch.setattr(compress, "compress", refused)
    monkeypatch.setattr(losses, "Bench", refused)
    latest = run.folder.parent / "latest"
    latest.symlink_to(run.folder.name)  # as a report leaves it
    assert compare(str(latest), options=OPTIONS, how=Measuring(process=refused)) == path
    assert found.run == run.id
    fewer = EvaluateConfig(arms=("personal",), metrics=("loss",), prompts=1)
    assert compare(str(run.folder), options=fewer, how=Measuring(process=refused)) != path


def test_an_arm_or_a_run_that_there_is_not_is_refused(run: Run, trained: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="holds no evaluation, so no set to compare"):
        compare(str(run.folder), options=OPTIONS)
    set_id = federate.freeze_current(str(run.folder))
    for arm, said in (
        ("zip@4", "METHOD of residual"),
        ("shared", "no federation"),
        ("centralised", "holds no"),
    ):
        with pytest.raises(ConfigError, match=said):
            compare(str(run.folder), set_id, options=EvaluateConfig(arms=(arm,)))


class Author:
    """A process that completes HumanEval as it likes, and is asked for nothing else."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.jobs: list[Job] = []

    def __call__(self, job: Job, path: Path, done: Done) -> dict[str, Any]:
        self.jobs.append(job)
        return {"texts": list(self.texts)}


def test_problems_are_completed_in_turn_and_their_tests_run(run: Run, trained: dict[str, str]) -> None:
    set_id = federate.freeze_current(str(run.folder))
    first, second = list(human_eval.problems().values())[:2]
    options = EvaluateConfig(arms=("personal",), metrics=("loss", "pass_at_1"), problems=2)
    author = Author("\n" + first["canonical_solution"], "\n    return None\n")
    try:
        path = compare(str(run.folder), set_id, options=options, how=Measuring(process=author))
    except SandboxError as error:
        pytest.skip(str(error))
    found = schema.read(path)
    assert [arm.pass_at_1 for arm in found.arms] == [0.5, 0.5] and found.generation.problems == 2
    assert "50.0%" in table.text(found) and "2 problems of HumanEval" in table.text(found)
    asks = [[(ask["user"], ask["prompt"]) for ask in job.asks] for job in author.jobs]
    prompts = [one["prompt"].removesuffix("\n") for one in (first, second)]
    assert asks == 2 * [list(zip(("ann", "bob"), prompts, strict=True))]
    assert [job.arm["name"] for job in author.jobs] == ["base", "personal"]
    told: list[str] = []
    again = Measuring(lambda said: told.append(str(said["note"])), process=refused)
    assert compare(str(run.folder), set_id, options=options, how=again) == path and told == []


def test_a_model_that_solves_nothing_has_no_column_and_the_table_says_so(
    run: Run, trained: dict[str, str]
) -> None:
    set_id = federate.freeze_current(str(run.folder))
    options = EvaluateConfig(arms=("base",), metrics=("loss", "pass_at_1"), problems=2)
    how = Measuring(process=Author("", "\n    return None"))
    try:
        path = compare(str(run.folder), set_id, options=options, how=how)
    except SandboxError as error:
        pytest.skip(str(error))
    found = schema.read(path)
    assert found.arms[0].pass_at_1 is None
    assert found.left_out["pass_at_1"] == "about zero for every arm: the best, base, has 0"
    lines = table.text(found).splitlines()
    assert "pass at 1" not in lines[0] and any(
        line.startswith("left out: pass_at_1: about") for line in lines
    )


def test_the_servers_engine_completes_problems_longer_than_a_runs_blocks(
    config_path: Path, overrides: dict[str, object], tiny_base: Path, tmp_path: Path
) -> None:
    wide = shutil.copytree(tiny_base, tmp_path / "wide")
    told = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**told, "max_position_embeddings": 1024}))
    run = open_run(prepare(str(config_path), {**overrides, "base.model": str(wide)}))
    arm, notes = Arm("base", "base", "base"), list[str]()
    try:
        job = solve.asked(run, ["ann"], EvaluateConfig(problems=1))
        found = solve.solved(run, arm, job, tell=lambda said: notes.append(said["note"]), process=here)
    except SandboxError as error:
        pytest.skip(str(error))
    assert found == {"HumanEval/0": False} and set(notes) == {"problems of base"}


def test_where_no_program_can_be_kept_apart_nothing_is_completed(
    run: Run, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says = f"sys.stderr.write('no namespaces'); sys.exit({sandbox_child.REFUSED})"
    (tmp_path / "child.py").write_text(f"import sys; sys.stdin.read(); {says}")
    monkeypatch.setattr(sandbox_child, "__file__", str(tmp_path / "child.py"))
    options = EvaluateConfig(arms=("base",), metrics=("pass_at_1",), problems=1)
    set_id = federate.freeze_current(str(run.folder))
    with pytest.raises(SandboxError, match="kept apart on this machine: no namespaces"):
        compare(str(run.folder), set_id, options=options, how=Measuring(process=refused))


def test_the_command_prints_what_it_was_asked_for_and_writes_the_page(
    run: Run, trained: dict[str, str]
) -> None:
    run.write("evaluation-first.json", {"set_id": federate.freeze_current(str(run.folder))})
    words = ["evaluate", str(run.folder), "--arm", "personal", "--metric", "loss"]
    done = CliRunner().invoke(main, [*words, "--users"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert re.match(r"arm +loss +over base", lines[0]) and lines[3].startswith("personal")
    assert [line.split()[:2] for line in lines if line.startswith("ann")] == [
        ["ann", "base"],
        ["ann", "personal"],
    ]
    assert any(line == "left out: pass_at_1: not asked for" for line in lines)
    assert str(run.folder / schema.PAGE) in lines[-1] and (run.folder / schema.PAGE).exists()
    assert "losses: ann" in done.stderr
    plain = CliRunner().invoke(main, words)
    assert plain.exit_code == 0 and "losses" not in plain.stderr and "\nann " not in plain.stdout
    wrong = CliRunner().invoke(main, [*words, "--metric", "rouge", "--problems", "165"])
    assert wrong.exit_code == 1 and "'rouge'" in wrong.stderr
    assert "problems = 165, allowed: at most 164" in wrong.stderr


def test_a_rule_that_does_not_hold_stops_a_publication(
    judged: tuple[Run, str, str], reconfigured: Callable[..., Run]
) -> None:
    run, bundle_id, evaluation = judged
    wave = {"min_mean_gain_kept": -10.0, "min_user_gain_kept": -10.0, "max_loss_over_shared": 99.0}
    rules = ("loss of joint@4 <= 99", "loss of joint@4 <= 0.001 of personal")
    compared = {"arms": ("personal", "joint@4"), "metrics": ("loss",)}
    run = reconfigured(gate={**wave, "max_relative_error": 9.0, "rules": rules}, evaluate=compared)
    evaluation = evaluate(str(run.folder), run.read(evaluation)["set_id"], bundle_id)
    with pytest.raises(GateError, match="the arms were not compared"):
        publish(str(run.folder), bundle_id, evaluation)
    told = tradeoff(str(run.folder), evaluation)
    assert told.evaluation != evaluation and (run.folder / evaluation).exists()
    with pytest.raises(
        GateError, match=r"0.001 of personal': loss of joint@4 is .*, allowed: at most"
    ) as broken:
        publish(str(run.folder), bundle_id, told.evaluation)
    assert len(broken.value.reasons) == 1
    assert judge.unheard(run, told.evaluation) == []


def test_an_adapter_of_all_layers_is_measured_beside_the_others(
    judged: tuple[Run, str, str], tmp_path: Path
) -> None:
    """Its losses are those of the whole model with it, which is run here in one piece."""
    run, _, _ = judged
    adapter, plain = everywhere(run), whole_loss(run, "ann", everywhere(run))
    adapters.write(adapter, run.folder / "centralised")
    named = identify(adapters.read(run.folder / "centralised"))
    run.write("centralised.json", {"path": "centralised", "adapter_id": named})
    options = EvaluateConfig(arms=("personal", "centralised"), metrics=("loss",))
    path = compare(str(run.folder), options=options)
    rows = {(row.user, row.arm): row for row in schema.read(path).rows}
    assert rows["ann", "centralised"].loss == pytest.approx(plain, rel=1e-5)
    again = schema.read(
        compare(str(run.folder), options=EvaluateConfig(arms=("personal",), metrics=("loss",)))
    )
    assert {row.loss for row in again.rows} <= {row.loss for row in rows.values()}


def everywhere(run: Run) -> LoraAdapter:
    """A LoRA on every layer of the run's model, that does something."""
    base = run.base()
    generator = torch.Generator().manual_seed(3)
    shapes = linear_shapes(models.skeleton(base))
    chosen = {name: shape for name, shape in shapes.items() if name.endswith(("q_proj", "v_proj"))}
    pairs = {
        name: LoraPair(0.3 * torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator))
        for name, (o, i) in chosen.items()
    }
    return LoraAdapter(pairs, base.name, base.hash)


def whole_loss(run: Run, user: str, adapter: LoraAdapter) -> float:
    """Nats a token of the user's held-out text, one example at a time."""
    base = run.base()
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    text = load_user(run.config.data, user)
    total, tokens = 0.0, 0
    with attached(model, adapter):
        for block in tokenize(text.heldout, tokenizer, max_tokens=run.config.data.max_tokens):
            count = int((block.labels[1:] != IGNORE).sum())
            loss = model(input_ids=block.ids[None], labels=block.labels[None]).loss
            total, tokens = total + count * float(loss), tokens + count
    return total / tokens


@pytest.mark.long
def test_a_process_of_its_own_says_how_far_it_is_and_what_went_wrong(judged: tuple[Run, str, str]) -> None:
    run, _, _ = judged
    notes: list[str] = []
    options = EvaluateConfig(arms=("personal",), metrics=("bleu",), prompts=1, max_new_tokens=4)
    path = compare(
        str(run.folder), options=options, how=Measuring(lambda said: notes.append(str(said["note"])))
    )
    ours = schema.read(compare(str(run.folder), options=options, how=Measuring(process=refused)))
    assert schema.read(path) == ours and "text of personal" in notes
    assert not list((run.folder / "tradeoff").glob("job-*"))
    run.registry().forget("bob")
    longer = EvaluateConfig(arms=("personal",), metrics=("bleu",), prompts=1, max_new_tokens=5)
    with pytest.raises(SoppuError, match="forgotten"):
        compare(str(run.folder), options=longer)


@pytest.mark.long
def test_the_command_prints_the_table_and_goes_on_where_it_was(judged: tuple[Run, str, str]) -> None:
    run, _, _ = judged
    words = ["evaluate", str(run.folder), "--arm", "personal", "--arm", "residual@3.5", "--users"]
    words += ["--prompts", "1", "--max-new-tokens", "4"]
    first = CliRunner().invoke(main, words)
    assert first.exit_code == 0, first.output
    assert re.search(r"^residual@3\.5 +\d\.\d{4}", first.stdout, re.M) and "text of personal" in first.stderr
    again = CliRunner().invoke(main, words)
    assert again.stdout == first.stdout and "text of" not in again.stderr
    wrong = CliRunner().invoke(main, [*words, "--prompts", "0", "--metric", "rouge"])
    assert wrong.exit_code == 1 and "rouge" in wrong.stderr and "prompts = 0" in wrong.stderr


@pytest.mark.long
def test_smollm2_completes_problems_and_its_programs_are_run(
    config_path: Path, overrides: dict[str, object]
) -> None:
    cache = Path(__file__).parents[4] / ".soppu" / "models"
    named = {"base.model": "smollm2-135m", "base.cache": str(cache), "data.max_tokens": 96}
    run = open_run(prepare(str(config_path), {**overrides, **named}))
    try:
        job = solve.asked(run, ["ann"], EvaluateConfig(problems=3))
        found = solve.solved(run, Arm("base", "base", "base"), job, tell=lambda said: None, process=here)
    except SandboxError as error:
        pytest.skip(str(error))
    assert list(found) == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    (kept,) = (run.folder / "tradeoff").glob("texts-*.json")
    texts = json.loads(kept.read_text())["texts"]
    assert all(text.startswith("\n    ") for text in texts)  # the body of a function
    assert not [text for text in texts for stop in human_eval.STOPS if stop in text]
