"""A federation that chose for each user: one is served their own adapter, one the shared one, one neither.

One real run that every test looks at: what is collected is compressed, measured, judged and published once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.errors import FederationError, TargetError
from soppu.evaluate import html
from soppu.evaluate.losses import EMULATOR, UserLosses
from soppu.federation.attach import attached
from soppu.federation.personalise import SHARED
from soppu.federation.simulation import free_port
from soppu.stages import evaluate as stage
from soppu.stages import federate
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.publish import publish
from soppu.stages.report import write_report
from soppu.stages.run import Run, open_run, prepare
from soppu.stages.targets import open_target
from soppu.targets import process
from tests.soppu.stages.conftest import three_users, train, write_result

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

LENIENT = {
    "gate.min_mean_gain_kept": -10.0,
    "gate.min_user_gain_kept": -10.0,
    "gate.max_relative_error": 1.0,
    "gate.min_mean_gain_over_shared": -10.0,
    "gate.max_loss_over_shared": 10.0,
}


@dataclass(frozen=True)
class Served:
    """What came of the run."""

    run: Run
    own: dict[str, str]  # user -> adapter id, as trained
    shared: LoraAdapter
    set_id: str
    bundle_id: str
    evaluation: str

    @property
    def members(self) -> dict[str, str]:
        return self.run.registry().get_set(self.set_id)

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        return {one["user"]: one for one in self.run.read(self.evaluation)["losses"]}


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """ann is best served her own adapter, bob the shared one, cleo the base model."""
    folder = tmp_path_factory.mktemp("served")
    url = f"http://127.0.0.1:{free_port()}"
    path = three_users(folder, tiny_base)
    run = open_run(prepare(str(path), {**LENIENT, "serve.url": url, "compress.rank": 12}))
    registry = run.registry()
    trained = {user: train(run, user) for user in ("ann", "bob", "cleo")}
    own = {user: registry.put_adapter(one, user=user, run=run.id) for user, one in trained.items()}
    shared = train(run, "bob", steps=6)
    write_result(run, own, shared=shared, bob="shared", cleo="base")
    set_id = federate.collect(str(run.folder), federate.federate(str(run.folder)))
    bundle_id = compress_set(str(run.folder), set_id)
    yield Served(run, own, shared, set_id, bundle_id, evaluate(str(run.folder), set_id, bundle_id))
    process.stop(Path(run.config.serve.state) / "server.pid")


def greedy(run: Run, adapter: LoraAdapter | None, prompt: str, tokens: int) -> str:
    """What the full model goes on with, token by token, with an adapter as it was trained."""
    base = run.base()
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    with torch.no_grad(), attached(model, adapter):
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True))


def test_the_set_holds_what_serves_each_best_and_nobody_who_is_best_served_without(served: Served) -> None:
    registry, members = served.run.registry(), served.members
    assert set(members) == {"ann", "bob"} and members["ann"] == served.own["ann"] != members["bob"]
    assert registry.get_adapter(members["bob"]).pairs.keys() == served.shared.pairs.keys()
    stored = registry.get_adapter(members["bob"])
    assert all(stored.pairs[name].B.equal(pair.B) for name, pair in served.shared.pairs.items())
    assert members["bob"] != served.own["bob"]


def test_who_is_served_the_base_model_has_no_current_adapter_but_a_history(served: Served) -> None:
    registry = served.run.registry()
    assert registry.current_set() == served.members
    assert [row.adapter_id for row in registry.history("cleo")] == [served.own["cleo"]]
    assert {row.adapter_id for row in registry.history("bob")} == {served.own["bob"], served.members["bob"]}


def test_collecting_again_and_freezing_at_night_give_the_same_set(served: Served) -> None:
    folder = str(served.run.folder)
    assert federate.collect(folder, federate.federate(folder)) == served.set_id
    night = federate.freeze_current(folder)
    assert served.run.registry().get_set(night) == served.members


def test_everybody_is_measured_in_four_ways_whatever_they_are_served(served: Served) -> None:
    losses = served.losses
    assert {user: one["served"] for user, one in losses.items()} == {
        "ann": "personal",
        "bob": "shared",
        "cleo": "base",
    }
    assert losses["cleo"]["compressed"] == losses["cleo"]["base"]
    assert losses["bob"]["compressed"] == pytest.approx(losses["bob"]["shared"], abs=0.02)
    assert losses["ann"]["compressed"] == pytest.approx(losses["ann"]["personal"], abs=0.02)
    for one in losses.values():
        assert len({one["base"], one["shared"], one["personal"]}) == 3
        assert one["measured_on"] == "full model"
        assert len(one["each"]["tokens"].split()) == one["examples"] == len(one["each"]["shared"].split())
    assert losses["cleo"]["validation_shared"] is None
    assert losses["ann"]["validation_shared"] > losses["ann"]["validation_compressed"]


def test_the_gate_judges_what_is_served(served: Served) -> None:
    verdict = served.run.read(served.evaluation)["verdict"]
    assert verdict["passed"] and verdict["improved_share"] == 1.0 and verdict["unmeasured"] == []
    gains = {user: one["shared"] - one["compressed"] for user, one in served.losses.items()}
    assert verdict["gain_over_shared"] == pytest.approx(sum(gains.values()) / 3)


def test_a_verdict_of_the_next_night_measures_the_same_adapters_without_a_federation(
    served: Served,
) -> None:
    """The recompression's run has no result to read: nothing is shared, and nobody's choice is known."""
    config = served.run.folder / "config.toml"
    nightly = open_run(prepare(str(config), {"runs": f"{served.run.config.runs}-nightly"}, text=False))
    set_id = federate.freeze_current(str(nightly.folder))
    bundle_id = compress_set(str(nightly.folder), set_id)
    name = evaluate(str(nightly.folder), set_id, bundle_id)
    told = {one["user"]: (one["served"], one["shared"]) for one in nightly.read(name)["losses"]}
    assert told == {"ann": ("current", None), "bob": ("current", None)}
    page = write_report(str(nightly.folder), name)
    assert "2 with the adapter they have" in page.users_markdown
    assert "over the shared adapter" not in page.users_markdown
    assert nightly.read(name)["verdict"]["gain_over_shared"] is None


def test_numbers_may_come_from_users_own_side(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where text may not leave: means alone, of an emulator; verdict and page are made all the same."""

    def asked(run: Run, members: Any, bundle_id: str, *, on_progress: Any = None) -> list[UserLosses]:
        assert set(members) == {"ann", "bob"} and bundle_id == served.bundle_id
        return [
            UserLosses("ann", 4, 3.0, 2.5, 2.52, 2.6, measured_on=EMULATOR),
            UserLosses("bob", 4, 3.0, 2.9, 2.71, 2.7, SHARED, measured_on=EMULATOR),
        ]

    monkeypatch.setattr(stage, "source_of", lambda run: asked)
    config = served.run.folder / "config.toml"
    other = open_run(prepare(str(config), {"runs": f"{served.run.config.runs}-elsewhere"}, text=False))
    bundle_id = compress_set(str(other.folder), served.set_id)
    name = evaluate(str(other.folder), served.set_id, bundle_id)
    assert other.read(name)["verdict"]["gain_over_shared"] == pytest.approx((0.08 - 0.01) / 2)
    report = json.loads((write_report(str(other.folder), name).html.parent / "report.json").read_text())
    ann = report["users"][0]
    assert (ann["measured_on"], ann["compression_lost"]) == ("emulator at the client", None)
    assert ann["gain_over_shared"] == {"mean": pytest.approx(0.08), "low": None, "high": None}
    assert "measured on the emulator at the client." in html.page(report)


def test_published_each_user_is_answered_with_what_serves_them_best(served: Served) -> None:
    run, prompt = served.run, "say 3: "
    folder = str(run.folder)
    publish(folder, served.bundle_id, served.evaluation)
    target = open_target(run)
    bundle = Bundle.load(run.registry().bundle_path(served.bundle_id))
    assert set(bundle.users) == {"ann", "bob"}
    answers = {user: target.complete(prompt, user=user, max_new_tokens=8) for user in bundle.users}
    own = run.registry().get_adapter(served.own["ann"])
    assert answers == {"ann": greedy(run, own, prompt, 8), "bob": greedy(run, served.shared, prompt, 8)}
    assert len({*answers.values(), greedy(run, None, prompt, 8)}) == 3
    with pytest.raises(TargetError, match="cleo"):
        target.complete(prompt, user="cleo", max_new_tokens=8)

    report = json.loads((write_report(folder, served.evaluation).html.parent / "report.json").read_text())
    rows = {user["id"]: user for user in report["users"]}
    assert {user: row["served"] for user, row in rows.items()} == {
        "ann": "personal",
        "bob": "shared",
        "cleo": "base",
    }
    assert rows["bob"]["adapter_id"] == served.members["bob"] and rows["cleo"]["adapter_id"] == ""
    assert set(report["serving"]["canaries"]) == {"ann", "bob"}
    page = html.page(report)
    assert "Served: 1 personal, 1 shared, 1 base." in page and "no adapter: the base model" in page


def test_the_shared_adapter_is_read_as_the_federation_left_it(served: Served) -> None:
    again = federate.shared_adapter(served.run)
    assert again is not None and again.pairs.keys() == served.shared.pairs.keys()
    adapters.validate(again, who="shared")
    assert all(again.pairs[name].A.equal(pair.A) for name, pair in served.shared.pairs.items())


def test_where_the_base_model_is_best_for_all_the_run_ends_and_says_so(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = open_run(prepare(str(three_users(tmp_path, tiny_base))))
    one = train(run, "ann")
    own = {user: run.registry().put_adapter(one, user=user, run=run.id) for user in ("ann", "bob", "cleo")}
    write_result(run, own, shared=one, **dict.fromkeys(own, "base"))
    federation = federate.federate(str(run.folder))
    with pytest.raises(FederationError, match=r"the base model is best for all 3 users.*local_steps"):
        federate.collect(str(run.folder), federation)
    assert run.registry().current_set() == own  # nothing was changed
