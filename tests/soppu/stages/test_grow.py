"""A basis that is due for a refit grows in the run that found it due, and nobody else is changed by it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle
from soppu.compress.joining import basis_of
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.errors import RegistryError
from soppu.stages import grow, pipeline
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.report import write_report
from soppu.stages.run import Run, open_run
from tests.soppu.stages.conftest import train, write_result

GROWS = {"basis.refit": "grow", "basis.grow_by": 6, "basis.min_probes": 1}


@pytest.fixture
def overrides() -> dict[str, object]:
    return dict(GROWS)


@dataclass(frozen=True)
class Fleet:
    """Three users told in a narrow basis that is in force; ann trained freely beside it."""

    run: Run
    basis: CoreBasis
    cores: dict[str, str]
    probe: str

    @property
    def folder(self) -> str:
        return str(self.run.folder)

    def evaluated(self, set_id: str) -> tuple[Bundle, str]:
        registry = self.run.registry()
        bundle_id = compress_set(self.folder, set_id)
        bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
        return bundle, evaluate(self.folder, set_id, bundle_id)


@pytest.fixture
def fleet(run: Run, trained: dict[str, str]) -> Fleet:
    registry = run.registry()
    bundle_id = compress_set(str(run.folder), registry.freeze(trained))
    first = basis_of(Bundle.load(registry.bundle_path(bundle_id)))
    sides = {name: (u[:, :2].contiguous(), v[:, :2].contiguous()) for name, (u, v) in first.sides.items()}
    basis = replace(first, sides=sides)
    registry.put_basis(basis)
    registry.put_start(basis.id, registry.get_adapter(trained["bob"]))
    cores = {}
    for user, held in trained.items():
        core = from_lora(registry.get_adapter(held), basis).core
        share = 0.05 if user == "ann" else 1.0
        told = replace(core, cores={name: one * share for name, one in core.cores.items()})
        cores[user] = registry.put_adapter(told, user=user, run=run.id)
    shared = registry.get_adapter(trained["bob"])
    nothing = {name: replace(pair, B=torch.zeros_like(pair.B)) for name, pair in shared.pairs.items()}
    write_result(run, cores, shared=replace(shared, pairs=nothing))
    registry.use_basis(basis.id)
    probe = registry.put_adapter(train(run, "ann", steps=25), user="ann")
    registry.put_adapter(registry.get_core(cores["ann"]), user="ann", run="again")
    return Fleet(run, basis, cores, probe)


def losses(run: Run, evaluation: str) -> dict[str, dict[str, float]]:
    return {one["user"]: one for one in run.read(evaluation)["losses"]}


def test_the_basis_grows_by_what_its_probe_has_outside_and_the_probe_is_served(fleet: Fleet) -> None:
    run, registry = fleet.run, fleet.run.registry()
    set_id = registry.freeze(fleet.cores)
    before, evaluation = fleet.evaluated(set_id)
    assert run.read(evaluation)["basis"]["due"] and grow.wanted(fleet.folder, evaluation)
    assert grow.refitted(fleet.folder, set_id) == set_id
    told_anew = grow.refit(fleet.folder, set_id, evaluation)
    noted = run.read(grow.FILE)
    new = registry.get_basis(noted["basis"])
    assert registry.current_basis(run.base().base) == new.id != fleet.basis.id
    probe = registry.get_adapter(fleet.probe)
    assert from_lora(probe, new).error < 0.5 * from_lora(probe, fleet.basis).error
    assert noted["probes"] == pytest.approx({"ann": from_lora(probe, new).error})
    old_start, start = (registry.get_start(one) for one in (fleet.basis.id, new.id))
    assert old_start and start and start.content_hash() == old_start.content_hash()
    members = registry.get_set(told_anew)
    assert {user for user, held in members.items() if held != fleet.cores[user]} == {"ann"}
    assert registry.current_set() == members  # the next night finds them so

    after, second = fleet.evaluated(told_anew)
    assert basis_of(after).id == new.id
    for user in ("bob", "cleo"):  # told in wider cores, and changed nothing
        for name, pair in before.reconstruct(user).pairs.items():
            torch.testing.assert_close(
                after.reconstruct(user).pairs[name].delta(), pair.delta(), atol=1e-5, rtol=1e-4
            )
    was, now = losses(run, evaluation), losses(run, second)
    assert now["ann"]["compressed"] < was["ann"]["compressed"] - 0.02
    found = run.read(second)
    assert found["verdict"]["passed"] and found["basis"]["grown_from"] == fleet.basis.id
    assert not found["basis"]["due"] and not grow.wanted(fleet.folder, second)
    write_report(fleet.folder, second)
    assert json.loads((run.folder / "report.json").read_text())["basis"] == found["basis"]
    page = (run.folder / "report.html").read_text()
    assert f"{new.id} grew out of {fleet.basis.id}, which was due for a refit" in page


def test_an_attempt_that_was_killed_is_gone_on_with(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = fleet.run.registry()
    set_id = registry.freeze(fleet.cores)
    _, evaluation = fleet.evaluated(set_id)

    def killed(*_: object) -> None:
        raise RegistryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(type(registry), "use_basis", killed)
        with pytest.raises(RegistryError, match="killed"):
            grow.refit(fleet.folder, set_id, evaluation)
    told_anew = grow.refit(fleet.folder, set_id, evaluation)
    history = [row.adapter_id for row in registry.history("ann")]
    assert grow.refit(fleet.folder, set_id, evaluation) == told_anew == grow.refitted(fleet.folder, set_id)
    assert [row.adapter_id for row in registry.history("ann")] == history
    assert registry.current_basis(fleet.run.base().base) == fleet.run.read(grow.FILE)["basis"]
    assert len(registry.bases()) == 2
    registry.use_basis(fleet.basis.id)  # somebody goes back to it
    wider = {name: (2 * u, v) for name, (u, v) in fleet.basis.sides.items()}
    other = registry.put_basis(replace(fleet.basis, sides=wider))
    registry.use_basis(other)
    assert grow.refit(fleet.folder, set_id, evaluation) == told_anew
    assert registry.current_basis(fleet.run.base().base) == other  # what was put in force meanwhile stays


def test_a_night_without_an_orchestrator_publishes_the_grown_basis(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole tail of the pipeline, twice: the second finds nothing to do."""
    published: list[str] = []
    monkeypatch.setattr(pipeline.publish, "publish", lambda run, bundle_id, *_: published.append(bundle_id))
    set_id = fleet.run.registry().freeze(fleet.cores)
    pipeline._recompress(fleet.folder, set_id)
    pipeline._recompress(fleet.folder, set_id)
    registry = fleet.run.registry()
    assert len(set(published)) == 1 and len(published) == 2
    bundle = Bundle.load(registry.bundle_path(published[0]))
    assert basis_of(bundle).id == registry.current_basis(fleet.run.base().base) != fleet.basis.id
    assert len(registry.bases()) == 2
    stages = json.loads((fleet.run.folder / "report.json").read_text())["stages"]
    assert "refit" in [one["name"] for one in stages]


def test_it_grows_only_where_that_is_asked_for_is_due_and_there_is_room(
    fleet: Fleet, reconfigured: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    set_id = fleet.run.registry().freeze(fleet.cores)
    _, evaluation = fleet.evaluated(set_id)
    reconfigured(basis={"refit": "report"})
    assert not grow.wanted(fleet.folder, evaluation)
    reconfigured(basis={"refit": "grow", "max_rank": 2})
    with caplog.at_level(logging.WARNING):
        assert not grow.wanted(fleet.folder, evaluation)
    assert f"{fleet.basis.id} is due for a refit and does not grow: it has 2 directions" in caplog.text
    reconfigured(basis={"max_rank": 128, "min_probes": 2})
    with caplog.at_level(logging.WARNING):
        assert not grow.wanted(fleet.folder, evaluation)
    assert "1 of the 2 probes that there have to be (basis.min_probes)" in caplog.text
    reconfigured(basis={"max_rank": 5, "min_probes": 1})
    grow.refit(fleet.folder, set_id, evaluation)
    cores = open_run(fleet.folder).read(grow.FILE)["cores"]
    assert all(max(shape) == 5 for shape in cores.values())


def test_a_basis_that_has_all_of_its_probes_stays_and_does_not_say_that_it_grew(fleet: Fleet) -> None:
    run, registry = fleet.run, fleet.run.registry()
    spanned = from_lora(registry.get_adapter(fleet.probe), fleet.basis).core
    registry.put_adapter(CoreInBasis(spanned, fleet.basis).to_lora(), user="ann")
    registry.put_adapter(registry.get_core(fleet.cores["ann"]), user="ann", run="again")
    set_id = registry.freeze(fleet.cores)
    _, evaluation = fleet.evaluated(set_id)
    notes: list[str] = []
    grow.refit(fleet.folder, set_id, evaluation, on_progress=lambda told: notes.append(str(told.get("note"))))
    assert run.read(grow.FILE)["basis"] == fleet.basis.id == registry.current_basis(run.base().base)
    assert len(registry.bases()) == 1 and grow.grown_from(run, fleet.basis.id) == ""
    assert any(f"{fleet.basis.id} has all of its probes" in note for note in notes)


@pytest.mark.parametrize("overrides", [{**GROWS, "basis.grow_by": 1}])
def test_a_probe_that_the_grown_basis_has_no_room_for_takes_no_core_away(fleet: Fleet) -> None:
    run, registry = fleet.run, fleet.run.registry()
    free, core = registry.get_adapter(fleet.probe), registry.get_core(fleet.cores["ann"])
    weak = replace(core, cores={name: 0.2 * one for name, one in core.cores.items()})
    registry.put_adapter(outside(free, fleet.basis, times=3), user="ann")
    fleet.cores["ann"] = registry.put_adapter(weak, user="ann")
    draw = torch.Generator().manual_seed(0)
    large = {
        name: LoraPair(*(torch.randn(side.shape, generator=draw) for side in (pair.A, pair.B)))
        for name, pair in free.pairs.items()
    }
    registry.put_adapter(replace(free, pairs=large), user="dan")  # takes what room there is
    set_id = registry.freeze(fleet.cores)
    _, evaluation = fleet.evaluated(set_id)
    (ann,) = [one for one in run.read(evaluation)["basis"]["probes"] if one["user"] == "ann"]
    assert ann["gain"] > ann["core_gain"]  # as it was trained
    told_anew = grow.refit(fleet.folder, set_id, evaluation)
    assert registry.get_set(told_anew) == fleet.cores and run.read(grow.FILE)["probes"] == {}
    _, second = fleet.evaluated(told_anew)
    was, now = losses(run, evaluation)["ann"], losses(run, second)["ann"]
    assert now["compressed"] == pytest.approx(was["compressed"], abs=1e-4)


def outside(adapter: LoraAdapter, basis: CoreBasis, *, times: float) -> LoraAdapter:
    """What an adapter changes at right angles to both sides of a basis, so many times."""
    pairs = {}
    for name, pair in adapter.pairs.items():
        u, v = (torch.linalg.qr(side)[0] for side in basis.sides[name])
        pairs[name] = LoraPair(pair.A - pair.A @ v @ v.mT, times * (pair.B - u @ u.mT @ pair.B))
    return replace(adapter, pairs=pairs)
