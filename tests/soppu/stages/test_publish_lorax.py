"""Publishing reconstructed adapters to a LoRAX: its silent faults are noticed, and nothing is half done.

The LoRAX is a double that computes its answers from the folders below it; see `lorax_double`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from soppu.cli import main
from soppu.compress import Bundle
from soppu.errors import BundleError, TargetError
from soppu.stages.expected import expected_traces
from soppu.stages.publish import publish
from soppu.stages.report import write_report
from soppu.stages.run import Run
from soppu.stages.targets import lorax_target, open_target, target_settings
from soppu.targets.canary import is_close
from tests.soppu.stages.conftest import without_effect
from tests.soppu.stages.test_stages import WAVE_THROUGH, evaluated
from tests.soppu.targets.lorax_double import Faults, LoraxDouble

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


@pytest.fixture
def double(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Iterator[LoraxDouble]:
    root = tmp_path / "data"
    root.mkdir()
    with LoraxDouble(root, tiny_llama, tiny_tokenizer, model_id="/models/tiny") as server:
        yield server


@pytest.fixture
def overrides(double: LoraxDouble) -> dict[str, object]:
    return {
        "serve.target": "lorax",
        "serve.url": double.url,
        "serve.lorax_image": "",
        "serve.lorax_volume": str(double.root),
        "serve.lorax_model": "/models/tiny",
        "serve.drain_s": 0,
    }


@pytest.fixture
def first(reconfigured: Callable[..., Run], trained: dict[str, str]) -> tuple[Run, str, str]:
    """A run whose bundle passed its gate, the bundle, and the evaluation's name."""
    run = reconfigured(gate=WAVE_THROUGH)
    return run, *evaluated(run)


def staged(run: Run, bundle_id: str) -> dict[str, str]:
    """User -> adapter id, the folders written as a publication writes them."""
    target = lorax_target(run, target_settings(run))
    target.publish(run.registry().bundle_path(bundle_id), bundle_id=bundle_id)
    return target.placements(bundle_id)


def folders(double: LoraxDouble) -> set[str]:
    return {str(path.relative_to(double.root)) for path in double.root.glob("adapters/*/*")}


def live(run: Run) -> str:
    return run.registry().live(run.config.serve.url)


def answers_as_its_adapter(run: Run, bundle_id: str) -> bool:
    """Whether the server gives every user, by the registry's ids, what the bundle's adapter gives here."""
    registry, tokens = run.registry(), 3
    bundle = Bundle.load(registry.bundle_path(bundle_id))
    expected = expected_traces(run.base(), bundle, bundle.users, prompt="say 3: ", tokens=tokens)
    target = lorax_target(run, target_settings(run))
    asked = {user: registry.resolve(user)[0].asked_as for user in bundle.users}
    got = {
        user: target._read(target._generate("say 3: ", asked_as, tokens)).trace
        for user, asked_as in asked.items()
    }
    return all(is_close(got[user], expected[user]) for user in bundle.users)


def test_users_are_served_by_path_and_doing_it_again_changes_nothing(
    first: tuple[Run, str, str], double: LoraxDouble, trained: dict[str, str]
) -> None:
    run, bundle_id, name = first
    assert publish(str(run.folder), bundle_id, name) == double.url
    before = folders(double)
    assert live(run) == bundle_id and len(before) == len(trained)
    assert {f"adapters/{user}" for user in trained} == {path.rpartition("/")[0] for path in before}
    assert answers_as_its_adapter(run, bundle_id)
    publish(str(run.folder), bundle_id, name)
    assert folders(double) == before and len(run.registry().publications()) == 1
    assert set(double.loads.values()) == {1}  # the second publication loads nothing

    report = json.loads((write_report(str(run.folder), name).html.parent / "report.json").read_text())
    (row,) = report["targets"]
    assert (row["form"], row["users"], row["error"]) == ("adapters", len(trained), "")
    assert set(report["serving"]["asked_as"].values()) == before
    assert report["serving"]["canaries_ok"] is True


def test_an_adapter_that_is_silently_not_applied_stops_the_publication(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    double.faults.silent_base = {staged(run, bundle_id)["bob"]}
    with pytest.raises(TargetError, match=r"canaries failed: bob: .*the base model's"):
        publish(str(run.folder), bundle_id, name)
    assert live(run) == "" and folders(double) == set()
    double.faults = Faults()
    publish(str(run.folder), bundle_id, name)
    assert live(run) == bundle_id


def test_another_adapter_than_the_one_asked_for_stops_the_publication(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    """Tensors that were changed after they had been written; to LoRAX they are as good as any."""
    run, bundle_id, name = first
    ids = staged(run, bundle_id)
    ann, bob = (double.root / ids[user] / "adapter_model.safetensors" for user in ("ann", "bob"))
    data = ann.read_bytes()
    bob.chmod(0o644)
    bob.write_bytes(data)
    with pytest.raises(TargetError, match=f"{ids['bob']}"):
        publish(str(run.folder), bundle_id, name)
    assert live(run) == ""


def test_a_refused_adapter_is_told_in_the_servers_words(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    double.faults.refused = {staged(run, bundle_id)["cleo"]}
    with pytest.raises(TargetError, match=r"canaries failed: cleo: HTTP 424: Request failed"):
        publish(str(run.folder), bundle_id, name)
    assert live(run) == ""


def test_slow_loading_is_waited_for(first: tuple[Run, str, str], double: LoraxDouble) -> None:
    run, bundle_id, name = first
    double.faults.load_seconds = 0.4
    publish(str(run.folder), bundle_id, name)
    assert live(run) == bundle_id


@pytest.mark.parametrize("answers", [1, *(pytest.param(number, marks=pytest.mark.long) for number in (0, 3))])
def test_a_server_that_dies_in_the_middle_leaves_what_was_live(
    first: tuple[Run, str, str], reconfigured: Callable[..., Run], double: LoraxDouble, answers: int
) -> None:
    run, bundle_id, name = first
    publish(str(run.folder), bundle_id, name)
    other = reconfigured(gate=WAVE_THROUGH, compress={"rank": 6})
    second, verdict = evaluated(other)
    double.faults.dies_after = answers
    with pytest.raises(TargetError, match="no answer"):
        publish(str(other.folder), second, verdict)
    assert live(run) == bundle_id
    double.restart()
    assert answers_as_its_adapter(run, bundle_id)
    publish(str(other.folder), second, verdict)
    assert live(run) == second and answers_as_its_adapter(other, second)


def test_a_new_version_is_another_id_and_the_one_before_stays(
    first: tuple[Run, str, str], reconfigured: Callable[..., Run], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    publish(str(run.folder), bundle_id, name)
    old = run.registry().placements(double.url)
    published = [bundle_id]
    for rank in (7, 6):
        other = reconfigured(gate=WAVE_THROUGH, compress={"rank": rank})
        published.append(evaluated(other)[0])
        publish(str(other.folder), *evaluated(other))
        assert answers_as_its_adapter(other, published[-1])
    new = run.registry().placements(double.url)
    assert not set(old.values()) & set(new.values())
    kept = lorax_target(run, target_settings(run)).bundles()
    assert set(kept) == set(published[1:])  # live, and the one before for a rollback; nothing drains
    assert not set(old.values()) & folders(double)
    rolled = roll_back(run, double, "--volume", str(double.root))
    assert rolled.exit_code == 0, rolled.output
    assert live(run) == published[1] and answers_as_its_adapter(run, published[1])


def test_what_may_still_be_asked_for_is_kept_while_it_drains(
    reconfigured: Callable[..., Run], trained: dict[str, str], double: LoraxDouble
) -> None:
    ids: list[dict[str, str]] = []
    for rank in (8, 7, 6):
        run = reconfigured(gate=WAVE_THROUGH, compress={"rank": rank}, serve={"drain_s": 3600})
        publish(str(run.folder), *evaluated(run))
        ids.append(run.registry().placements(double.url))
    assert {path for version in ids for path in version.values()} == folders(double)


def roll_back(run: Run, double: LoraxDouble, *words: str) -> Result:
    where = ["--url", double.url, "--registry", run.config.registry.root]
    return CliRunner().invoke(main, ["rollback", *where, *words])


def test_a_rollback_asks_for_the_volume_and_refuses_what_is_not_in_it(
    first: tuple[Run, str, str], reconfigured: Callable[..., Run], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    publish(str(run.folder), bundle_id, name)
    other = reconfigured(gate=WAVE_THROUGH, compress={"rank": 6})
    publish(str(other.folder), *evaluated(other))
    assert "--volume says which" in roll_back(run, double).output
    lorax_target(run, target_settings(run)).drop(bundle_id)
    refused = roll_back(run, double, "--volume", str(double.root))
    assert refused.exit_code == 1 and bundle_id[:12] in refused.output
    assert live(run) == evaluated(other)[0]


def test_another_base_model_inside_is_refused_before_anything_is_written(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    double.model_id = "somebody/else"
    with pytest.raises(TargetError, match=r"serves base model .*somebody/else.*, expected .*'/models/tiny'"):
        publish(str(run.folder), bundle_id, name)
    assert not (double.root / "adapters").exists()


def test_a_user_who_was_forgotten_meanwhile_is_not_published(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    run.registry().forget("bob")
    with pytest.raises(TargetError, match="holds a user who was forgotten"):
        publish(str(run.folder), bundle_id, name)
    assert folders(double) == set()


def test_an_adapter_without_effect_is_refused_and_the_last_one_stays(
    first: tuple[Run, str, str], double: LoraxDouble
) -> None:
    run, bundle_id, name = first
    publish(str(run.folder), bundle_id, name)
    with pytest.raises(BundleError, match=r"bob: .* too small"):
        publish(str(run.folder), without_effect(run, bundle_id), name)
    assert live(run) == bundle_id and answers_as_its_adapter(run, bundle_id)


@pytest.mark.parametrize(
    ("serve", "told"),
    [
        ({"url": "http://127.0.0.1:9"}, "http://127.0.0.1:9: nobody answers there, and serve.lorax_image"),
        ({"lorax_volume": "/nowhere/at/all"}, "/nowhere/at/all: no such folder"),
    ],
)
def test_what_is_not_there_is_named(
    reconfigured: Callable[..., Run], trained: dict[str, str], serve: dict[str, str], told: str
) -> None:
    run = reconfigured(gate=WAVE_THROUGH, serve=serve)
    with pytest.raises(TargetError, match=told):
        open_target(run)
