"""The stages after the federation, one after the other, against a real registry and a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from soppu import calibrate
from soppu.cli import main
from soppu.errors import FederationError, GateError, RegistryError, TargetError
from soppu.federation.simulation import free_port
from soppu.stages import federate
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.publish import publish
from soppu.stages.report import write_report
from soppu.stages.run import Run
from soppu.stages.targets import open_target
from soppu.targets import process
from tests.soppu.stages.conftest import train, without_effect, write_result

WAVE_THROUGH = {"min_mean_gain_kept": -10.0, "min_user_gain_kept": -10.0, "max_relative_error": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """The server of this file's runs, started by the first publication; registries are their own."""
    state = tmp_path_factory.mktemp("serve")
    yield {"serve.url": f"http://127.0.0.1:{free_port()}", "serve.state": str(state)}
    process.stop(state / "server.pid")


@pytest.fixture
def overrides(server: dict[str, object]) -> dict[str, object]:
    return server


def evaluated(run: Run) -> tuple[str, str]:
    set_id = federate.freeze_current(str(run.folder))
    bundle_id = compress_set(str(run.folder), set_id)
    return bundle_id, evaluate(str(run.folder), set_id, bundle_id)


def test_freezing_an_empty_registry_says_so(run: Run) -> None:
    with pytest.raises(FederationError, match="run the full pipeline first"):
        federate.freeze_current(str(run.folder))


def test_a_federation_that_is_done_is_not_run_again(run: Run, trained: dict[str, str]) -> None:
    write_result(run, trained)
    first = federate.federate(str(run.folder))
    assert federate.federate(str(run.folder)) == first
    assert not (run.folder / "federation" / "flower.log").exists()  # no process was started


def test_collecting_makes_a_federation_current_and_keeps_everybody_else_served(
    run: Run, trained: dict[str, str]
) -> None:
    registry = run.registry()
    newer = registry.put_adapter(train(run, "ann", steps=3), user="ann")
    older = {"ann": trained["ann"], "bob": trained["bob"]}
    write_result(run, older)
    assert registry.current("ann") == newer
    set_id = federate.collect(str(run.folder), federate.federate(str(run.folder)))
    assert registry.get_set(set_id) == trained  # cleo took no part, and is still there
    assert registry.current_set() == trained


def test_a_federation_that_another_run_overtook_freezes_its_own_and_nothing_of_the_other(
    run: Run, trained: dict[str, str]
) -> None:
    registry = run.registry()
    write_result(run, trained)
    federation = federate.federate(str(run.folder))
    other = registry.put_adapter(train(run, "bob", steps=2), user="bob", run="another")
    nightly = registry.get_set(federate.freeze_current(str(run.folder)))
    assert nightly == {**trained, "bob": other}
    assert registry.get_set(federate.collect(str(run.folder), federation)) == trained
    assert [row.adapter_id for row in registry.history("bob")] == [trained["bob"], other, trained["bob"]]


def test_a_user_forgotten_after_the_federation_is_not_brought_back_by_collecting_it(
    run: Run, trained: dict[str, str]
) -> None:
    write_result(run, trained)
    federation = federate.federate(str(run.folder))
    run.registry().put_adapter(run.registry().get_adapter(trained["bob"]), user="dan")  # the tensors stay
    run.registry().forget("bob")
    with pytest.raises(RegistryError, match="user 'bob' does not hold"):
        federate.collect(str(run.folder), federation)
    assert "bob" not in run.registry().current_set()


def test_collecting_the_result_of_another_federation_is_refused(run: Run, trained: dict[str, str]) -> None:
    write_result(run, trained)
    with pytest.raises(FederationError, match="asked for f-0"):
        federate.collect(str(run.folder), "f-0")


def test_every_stage_called_twice_gives_the_same_ids(run: Run, trained: dict[str, str]) -> None:
    folder = str(run.folder)
    set_id = federate.freeze_current(folder)
    assert federate.freeze_current(folder) == set_id
    assert run.registry().get_set(set_id) == trained
    bundle_id = compress_set(folder, set_id)
    assert compress_set(folder, set_id) == bundle_id


def test_evaluation_measures_every_user_three_ways(run: Run, trained: dict[str, str]) -> None:
    bundle_id, name = evaluated(run)
    found = run.read(name)
    assert [item["user"] for item in found["losses"]] == sorted(trained)
    for item in found["losses"]:
        assert item["personal"] < item["base"]
        assert item["compressed"] == pytest.approx(item["personal"], abs=0.5)
    assert found["bundle_id"] == bundle_id


def test_a_verdict_on_other_text_leaves_the_one_before_as_it_was(run: Run, trained: dict[str, str]) -> None:
    bundle_id, first = evaluated(run)
    before = run.read(first)
    path = Path(run.config.data.source) / "bob.jsonl"
    text = path.read_text()
    path.write_text(text.replace("bob says", "quite another thing is said"))
    assert evaluated(run)[0] == bundle_id
    second = evaluated(run)[1]
    assert second != first and run.read(first) == before
    measured = {item["user"]: item["base"] for item in run.read(second)["losses"]}
    was = {item["user"]: item["base"] for item in before["losses"]}
    assert measured["bob"] != was["bob"] and measured["ann"] == was["ann"]
    path.write_text(text)
    assert evaluated(run)[1] == first


def test_full_rank_keeps_all_of_the_gain(reconfigured: Callable[..., Run], trained: dict[str, str]) -> None:
    run = reconfigured(compress={"rank": 4 * len(trained)})
    for item in run.read(evaluated(run)[1])["losses"]:
        assert item["compressed"] == pytest.approx(item["personal"], abs=1e-4)


def test_the_default_method_reaches_its_target_and_says_how_far_it_is(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(compress={"method": "residual", "ratio": 2.0})
    told: list[dict[str, Any]] = []
    set_id = federate.freeze_current(str(run.folder))
    bundle_id = compress_set(str(run.folder), set_id, on_progress=told.append)
    report = run.read(f"compression-{bundle_id[:16]}.json")
    assert (report["method"], report["target"]) == ("residual", "2x")
    assert 2 * report["parameters_before"] >= 2 * report["bytes_after"]
    assert any("3 of 3 users" in one["note"] for one in told)
    assert all(one["share"] < 1.0 for one in told[:-1]) and told[-1]["share"] == 1.0


def test_a_bundle_of_another_method_trains_nothing(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    digests, bundles = set(), set()
    for changes in ({}, {"method": "svd", "max_error": 0.3}, {"method": "ternary"}):
        run = reconfigured(compress=changes)
        digests.add(run.config.training_digest())
        bundles.add(compress_set(str(run.folder), federate.freeze_current(str(run.folder))))
    assert len(digests) == 1 and len(bundles) == 3


def test_whitening_measures_the_base_model_once_a_run(
    reconfigured: Callable[..., Run], trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = tmp_path / "public.jsonl"
    lines = [{"user_id": "p", "prompt": f"say {n}: ", "completion": "anything"} for n in range(6)]
    public.write_text("\n".join(map(json.dumps, lines)))
    calls: list[int] = []
    real = calibrate.second_moments

    def counted(model: Any, blocks: Any, *rest: Any, **more: Any) -> Any:
        calls.append(len(blocks))
        return real(model, blocks, *rest, **more)

    monkeypatch.setattr(calibrate, "second_moments", counted)
    bundles = []
    for examples in (4, 4, 5):
        run = reconfigured(
            align={"source": str(public)},
            compress={"rank": 3, "whiten": True, "calibration_examples": examples},
        )
        bundles.append(compress_set(str(run.folder), federate.freeze_current(str(run.folder))))
    assert calls == [4, 5] and bundles[0] == bundles[1]
    report = run.read(f"compression-{bundles[0][:16]}.json")
    assert report["whitened"] is True
    plain = reconfigured(compress={"whiten": False})
    assert compress_set(str(plain.folder), federate.freeze_current(str(plain.folder))) not in bundles


def test_a_user_without_text_here_is_judged_by_the_error_alone(
    run: Run, reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    narrowed = reconfigured(data={"users": ("ann", "bob")})
    found = narrowed.read(evaluated(narrowed)[1])
    assert [item["user"] for item in found["losses"]] == ["ann", "bob"]
    assert found["verdict"]["unmeasured"] == ["cleo"]


def test_publishing_serves_every_user_and_doing_it_again_changes_nothing(
    run: Run, reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    bundle_id, name = evaluated(run)
    folder = str(run.folder)
    assert publish(folder, bundle_id, name) == run.config.serve.url
    target = open_target(run)
    assert target.active() == bundle_id
    assert publish(folder, bundle_id, name) == run.config.serve.url
    assert target.bundles() == (bundle_id,)
    assert run.registry().publications()[0].bundle_id == bundle_id

    report = json.loads((write_report(folder, name).html.parent / "report.json").read_text())
    assert report["serving"]["canaries_ok"] is True
    assert set(report["serving"]["canaries"]) == set(trained)
    assert report["compression"]["bytes_after"] == run.registry().bundle_path(bundle_id).stat().st_size
    assert (run.folder.parent / "latest").resolve() == run.folder


def test_the_gate_stops_a_bundle_and_leaves_what_was_published(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    first, name = evaluated(run)
    publish(str(run.folder), first, name)
    run = reconfigured(gate={"min_mean_gain_kept": 1.0}, compress={"rank": 1})
    second, name = evaluated(run)
    with pytest.raises(GateError, match=r"gate\.min_mean_gain_kept") as refused:
        publish(str(run.folder), second, name)
    assert refused.value.reasons
    target = open_target(run)
    assert target.active() == first
    assert target.bundles() == (first,)
    assert run.registry().publications()[0].bundle_id == first
    report = json.loads((write_report(str(run.folder), name).html.parent / "report.json").read_text())
    assert report["serving"] is None and report["gate"]["reasons"]


def test_a_failed_canary_leaves_what_was_published(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    first, name = evaluated(run)
    publish(str(run.folder), first, name)
    broken = without_effect(run, first)
    with pytest.raises(TargetError, match=r"canaries failed: bob: .*no effect"):
        publish(str(run.folder), broken, name)
    target = open_target(run)
    assert target.active() == first
    assert target.bundles() == (first,)
    assert run.registry().publications()[0].bundle_id == first


def test_the_bundle_before_stays_for_a_rollback_and_older_ones_go(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    published = []
    for rank in (8, 7, 6):
        run = reconfigured(gate=WAVE_THROUGH, compress={"rank": rank})
        bundle_id, name = evaluated(run)
        publish(str(run.folder), bundle_id, name)
        published.append(bundle_id)
    target = open_target(run)
    assert set(target.bundles()) == set(published[1:])
    where = ["--url", run.config.serve.url, "--registry", run.config.registry.root]
    where += ["--state", run.config.serve.state]
    result = CliRunner().invoke(main, ["rollback", *where])
    assert result.exit_code == 0, result.output
    assert target.active() == run.registry().publications()[0].bundle_id == published[1]
    result = CliRunner().invoke(main, ["rollback", *where, "--to", published[0]])  # no longer on the server
    assert result.exit_code == 0, result.output
    assert target.active() == published[0]


def test_there_is_nothing_to_roll_back_to_at_first(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    bundle_id, name = evaluated(run)
    publish(str(run.folder), bundle_id, name)
    where = ["--url", run.config.serve.url, "--registry", run.config.registry.root]
    where += ["--state", run.config.serve.state]
    result = CliRunner().invoke(main, ["rollback", *where])
    assert result.exit_code == 1
    assert "was published there" in result.output
    assert open_target(run).active() == bundle_id


def test_a_bundle_with_a_forgotten_user_never_goes_live_again(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    run = reconfigured(gate=WAVE_THROUGH)
    with_bob, name = evaluated(run)
    publish(str(run.folder), with_bob, name)
    run.registry().forget("bob")
    with pytest.raises(TargetError, match="a user who was forgotten"):
        publish(str(run.folder), with_bob, name)
    without, name = evaluated(run)
    publish(str(run.folder), without, name)
    target = open_target(run)
    assert target.bundles() == (without,)
    where = ["--url", run.config.serve.url, "--registry", run.config.registry.root]
    where += ["--state", run.config.serve.state]
    assert CliRunner().invoke(main, ["rollback", *where]).exit_code == 1
    assert CliRunner().invoke(main, ["rollback", *where, "--to", with_bob]).exit_code == 1
    assert target.active() == without


def test_publishing_again_keeps_the_bundle_to_roll_back_to(
    reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    published = []
    for rank in (8, 7):
        run = reconfigured(gate=WAVE_THROUGH, compress={"rank": rank})
        bundle_id, name = evaluated(run)
        publish(str(run.folder), bundle_id, name)
        published.append(bundle_id)
    publish(str(run.folder), bundle_id, name)
    assert set(open_target(run).bundles()) == set(published)


def test_a_user_who_has_too_little_text_left_does_not_stop_the_others(
    run: Run, reconfigured: Callable[..., Run], trained: dict[str, str]
) -> None:
    path = Path(run.config.data.source) / "cleo.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]))
    found = run.read(evaluated(run)[1])
    assert [item["user"] for item in found["losses"]] == ["ann", "bob"]
    assert found["verdict"]["unmeasured"] == ["cleo"]


def test_a_forgotten_user_is_not_in_the_next_set(run: Run, trained: dict[str, str]) -> None:
    old = federate.freeze_current(str(run.folder))
    run.registry().forget("bob")
    new = federate.freeze_current(str(run.folder))
    assert set(run.registry().get_set(new)) == {"ann", "cleo"}
    with pytest.raises(RegistryError, match="forgotten"):
        compress_set(str(run.folder), old)
