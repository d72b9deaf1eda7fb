"""A router from a run's text to a server's answers: fitted, judged, written, loaded, and deciding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from starlette.testclient import TestClient
from transformers import PreTrainedModel

from benchmarks import router as benchmark
from benchmarks.router import Timing
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.cli import main
from soppu.compress import Bundle, CompressOptions, compress
from soppu.data import Example, load_user
from soppu.errors import RouterError
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.router import deciding, policies
from soppu.serve.router import file as files
from soppu.serve.router.deciding import RequestRouter, RouterOptions
from soppu.serve.router.file import RouterFile
from soppu.serve.router.policies import FITTED, ORACLE
from soppu.stages import router
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.federate import freeze_current
from soppu.stages.router import FitOptions
from soppu.stages.run import Run, open_run, prepare
from tests.soppu.serve import tiny
from tests.soppu.stages.conftest import USERS, three_users, train, without_effect


@dataclass(frozen=True)
class Fitted:
    """A judged run whose bob has an adapter without effect; a smaller bundle; and the router of both."""

    run: Run
    bundle: Bundle
    bundle_id: str
    cheaper: Path
    path: Path
    said: str

    @property
    def file(self) -> RouterFile:
        return files.read(self.path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Fitted:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    run = open_run(prepare(str(three_users(folder, tiny_base))))
    registry = run.registry()
    adapters = {user: train(run, user, steps=5) for user in USERS}
    for user, adapter in adapters.items():
        registry.put_adapter(adapter, user=user, run=run.id)
    set_id = freeze_current(str(run.folder))
    bundle_id = without_effect(run, compress_set(str(run.folder), set_id))
    evaluate(str(run.folder), set_id, bundle_id)
    smaller(adapters).save(folder / "small.soppu")
    done = soppu("router", "fit", run.folder, "--cheaper", folder / "small.soppu", "-o", folder / "r.json")
    assert done.exit_code == 0, done.output
    bundle = Bundle.load(registry.bundle_path(bundle_id))
    return Fitted(run, bundle, bundle_id, folder / "small.soppu", folder / "r.json", done.output)


def smaller(adapters: Mapping[str, LoraAdapter]) -> Bundle:
    return compress(adapters, CompressOptions(method="joint", rank=2, core_bits=32, device="cpu"))


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def prompts_of(fitted: Fitted) -> list[tuple[str, Example]]:
    """(user, example) in the order in which a fit measures: held out, then validation, nothing trained on."""
    data = dataclasses.replace(fitted.run.config.data, heldout_examples=48, validation_examples=48)
    found = []
    for user in USERS:
        text = load_user(data, user)
        trained = load_user(fitted.run.config.data, user).train
        apart = [item for item in (*text.heldout, *text.validation) if item not in trained]
        found += [(user, item) for item in dict.fromkeys(apart)]
    return found


def test_what_is_measured_is_what_a_plain_forward_of_every_arm_gives(fitted: Fitted) -> None:
    measured, base = fitted.file.measured, fitted.run.base()
    tokenizer = models.load_tokenizer(base)
    asked = prompts_of(fitted)
    assert list(measured.asked.users) == [user for user, _ in asked]
    bundles = (None, fitted.bundle, Bundle.load(fitted.cheaper))
    arms = {
        user: [
            tiny.merged(models.load_model(base), bundle.reconstruct(user) if bundle else None)
            for bundle in bundles
        ]
        for user in USERS
    }
    for place in range(0, len(asked), 5):
        user, example = asked[place]
        prompt = tokenizer.encode(example.prompt)
        completion = [*tokenizer.encode(example.completion, add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *completion][:48]])
        assert measured.tokens[place] == ids.shape[1] - len(prompt)
        assert measured.asked.lengths[place] == len(prompt)
        for arm, plain in enumerate(arms[user]):
            with torch.no_grad():
                out = plain(input_ids=ids, output_hidden_states=True)
            nats = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
            read = len(prompt) - 1
            assert measured.losses[place, arm] == pytest.approx(float(nats[read:].sum()), rel=1e-4)
            assert measured.asked.reading[place, arm] == pytest.approx(float(nats[:read].mean()), rel=1e-4)
            below = out.hidden_states[fitted.file.layer][0, : len(prompt)].mean(0)
            assert np.allclose(measured.asked.vectors[place], below.numpy(), atol=1e-4)


@dataclass(frozen=True)
class Server:
    """An engine that holds both bundles, the run's own being active."""

    engine: Engine
    model: PreTrainedModel

    def router(self, path: Path, **options: Any) -> RequestRouter:
        found = deciding.opened(RouterOptions(path, **options), engine=self.engine, model=self.model)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def server(fitted: Fitted) -> Iterator[Server]:
    base = fitted.run.base()
    model = models.load_model(base)
    bank = AdapterBank(model, base_hash=base.hash)
    for bundle_id, bundle in (
        (digest(fitted.cheaper), Bundle.load(fitted.cheaper)),
        (fitted.bundle_id, fitted.bundle),
    ):
        bank.stage(bundle, bundle_id=bundle_id)
    bank.activate(fitted.bundle_id)
    with Engine(model, models.load_tokenizer(base), bank) as engine:
        yield Server(engine, model)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("policy", list(FITTED))
def test_a_server_decides_as_the_fit_would_and_that_arm_answers(
    fitted: Fitted, server: Server, policy: str
) -> None:
    found, asked = fitted.file, prompts_of(fitted)
    expected = policies.choose(found.fitted(policy).expect(found.measured.asked), found.options)
    routing, info = server.router(fitted.path, mode="on", policy=policy), ServerInfo("tiny", found.base_hash)
    app = create_app(server.engine, info=info, state=None, router=routing)  # type: ignore[arg-type]
    client = TestClient(app)  # not entered: the engine runs already
    for place in range(0, len(asked), 12):
        user, example = asked[place]
        arm = found.options.arms[int(expected[place])]
        answer = generate(client, example.prompt, user)
        assert (answer.headers["x-router-policy"], answer.headers["x-router-arm"]) == (policy, arm.name)
        plain = GenerationRequest(example.prompt, arm.adapter_id(user), max_new_tokens=4, ignore_eos=True)
        assert answer.json()["generated_text"] == server.engine.submit(plain).result()[1].text
    if policy == "cheaper":
        assert arm.adapter_id("ann") == f"ann@{digest(fitted.cheaper)}"


def generate(client: TestClient, prompt: str, user: str) -> Any:
    parameters = {"adapter_id": user, "max_new_tokens": 4, "ignore_eos_token": True}
    answer = client.post("/generate", json={"inputs": prompt, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer


def test_what_becomes_of_the_cheaper_arm_where_a_server_has_not_got_it(
    fitted: Fitted, server: Server
) -> None:
    bank, held = server.engine.bank, digest(fitted.cheaper)
    asked = GenerationRequest("say 1: ", "ann")
    routing = server.router(fitted.path, mode="on", policy="cheaper")
    bank.drop(held)
    try:
        decision = routing.decide(asked)
        # reading the prompt with every arm cannot be done then
        read = server.router(fitted.path, mode="on", policy="likelihood").decide(asked)
    finally:
        bank.stage(Bundle.load(fitted.cheaper), bundle_id=held)
    assert (decision.why, decision.adapter_id, read.why) == ("arm not served", "ann", "refused")
    assert routing.decide(asked).adapter_id == f"ann@{held}"


def test_without_another_bundle_the_run_s_own_evaluation_is_the_prior(
    fitted: Fitted, server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "router.json"
    found = router.fit(str(fitted.run.folder), path, FitOptions(prompts=3))
    losses = fitted.run.read(found.prior_from)["losses"]
    assert found.options.prior == {one["user"]: (one["base"], one["compressed"]) for one in losses}
    assert [arm.name for arm in found.options.arms] == ["base", "personal"]
    assert [row["policy"] for row in found.table] == [*(n for n in FITTED if n != "cheaper"), ORACLE]
    assert max(len(places) for places in found.measured.of_users().values()) == 3
    routing = server.router(path, mode="on", policy="gain")
    arms = {user: routing.decide(GenerationRequest("say 1: ", user)).arm for user in USERS}
    assert arms == {"ann": "personal", "bob": "base", "cleo": "personal"}  # bob's adapter does nothing
    with pytest.raises(RouterError, match="policy 'cheaper', allowed: personal, base, gain, neigh"):
        server.router(path, mode="on", policy="cheaper")


def test_what_was_judged_is_printed_and_printed_again(fitted: Fitted) -> None:
    shown = soppu("router", "show", fitted.path)
    assert shown.exit_code == 0 and shown.stdout.strip() in fitted.said
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line}
    for row in fitted.file.table:
        assert f"{row['quality']:.4f}" in lines[row["policy"]]
        assert f"{row['regret_personal']:+.4f}" in lines[row["policy"]]
    assert "(0 bytes)" in lines["arms"] and f"{len(fitted.file.measured)} prompts" in lines["measured"]
    again = soppu("router", "fit", fitted.run.folder, "--policy", "gain", "--prompts", 2)
    assert again.exit_code == 0, again.output
    assert "policy      gain: asked for" in again.output
    assert files.read(fitted.run.folder / router.FILE).policy == "gain"


def test_what_cannot_be_a_cheaper_arm_is_told_before_anything_is_measured(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "measure", None)
    small = Bundle.load(fitted.cheaper)
    told = {
        "made for base model cccccccccccc": dataclasses.replace(small, base_hash="c" * 64),
        "is of dan, eve, the run's bundle of ann, bob, cleo": smaller(
            {"dan": small.reconstruct("ann"), "eve": small.reconstruct("cleo")}
        ),
        "it is not cheaper; compress the same adapters to a higher ratio": fitted.bundle,
    }
    for number, (why, bundle) in enumerate(told.items()):
        path = tmp_path / f"{number}.soppu"
        bundle.save(path)
        assert why in refused(fitted.run.folder, "--cheaper", path)
    no_bundle = fitted.run.folder / "config.toml"
    assert f"{no_bundle}: truncated" in refused(fitted.run.folder, "--cheaper", no_bundle)
    assert "'best', allowed: personal, base, gain" in refused(fitted.run.folder, "--policy", "best")
    assert "'cheaper', allowed: personal" in refused(fitted.run.folder, "--policy", "cheaper")


def refused(run: Path, *words: object) -> str:
    """The one sentence that a fit ends with."""
    done = soppu("router", "fit", run, *words)
    said = done.output.strip().splitlines()
    assert done.exit_code == 1 and said[-1].startswith("Error: "), done.output
    return said[-1]


def test_a_run_that_was_not_judged_is_told(fitted: Fitted, tmp_path: Path) -> None:
    run = shutil.copytree(fitted.run.folder, tmp_path / "run", symlinks=True)
    (held,) = run.glob("evaluation-*.json")
    judged = held.read_text()
    held.write_text(judged[:100])
    assert f"{held}: not JSON" in refused(run)
    held.unlink()
    assert "holds no evaluation-*.json" in refused(run)
    assert "not a run folder" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["equal", "plain"])
def test_text_in_which_nothing_different_is_asked_is_told(fitted: Fitted, tmp_path: Path, kind: str) -> None:
    run = shutil.copytree(fitted.run.folder, tmp_path / "run", symlinks=True)
    source = Path(fitted.run.config.data.source)
    shutil.copytree(source, tmp_path / "users")
    for path in (tmp_path / "users").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        asked = {"prompt": "say: "} if kind == "equal" else {}
        said = [row["completion"] + row["prompt"] for row in rows]
        rows = [{"user_id": path.stem, "completion": text, **asked} for text in said]
        path.write_text("\n".join(map(json.dumps, rows)))
        if kind == "plain":
            path.rename(path.with_suffix(".txt")).write_text("\n\n".join(text * 30 for text in said))
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(source), str(tmp_path / "users")))
    said = refused(run)
    assert "of 3 users, needed: two different ones" in said
    assert ("Error: 0 prompts" in said) == (kind == "plain")


def test_the_benchmark_times_every_arm_and_every_policy(fitted: Fitted) -> None:
    found = fitted.file
    taken = benchmark.timed_on(
        fitted.run, found, (fitted.path, fitted.cheaper), Timing(prompts=1, rounds=1, new_tokens=2)
    )
    assert list(taken.arms) == ["base", "personal", "cheaper"] and list(taken.deciding) == list(FITTED)
    assert all(len(one) == len(USERS) for one in (*taken.arms.values(), *taken.deciding.values()))
    for row, judged in zip(benchmark.with_costs(found.table, taken), found.table, strict=True):
        assert list(row)[:4] == ["policy", "quality", "cost", "bytes"] and row["quality"] == judged["quality"]
        arms = sum(share * sum(taken.arms[arm]) / len(USERS) for arm, share in row["arms"].items())
        assert row["cost"] == pytest.approx(arms + row["deciding"])
        assert 0 < row["deciding"] < 60 or row["policy"] == ORACLE
    arms_ = benchmark.arms_of(found, taken, seed=0)
    assert [arm["bytes"] for arm in arms_] == [arm.bytes for arm in found.options.arms]
    assert arms_[0]["interval_to_base"] == [1, 1] and all(arm["to_base"] > 0 for arm in arms_)
