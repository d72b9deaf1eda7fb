"""One run from a cohort's adapters to everybody's cores, and what later runs make of the basis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.workbench import workbench
from server.app import main
from soppu import adapter as adapters
from soppu.cores import basis_file
from soppu.cores import folder as core_folder
from soppu.cores.around import around
from soppu.cores.basis import drawn
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.errors import ConfigError, FederationError
from soppu.federation import chosen_basis, simulation, wire_core
from soppu.federation.personalise import PERSONAL
from soppu.federation.simulation import Simulation
from soppu.registry import Registry
from soppu.stages import basis, choosing, federate, forms
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.report import stage_names, write_report
from soppu.stages.run import Run, open_run, prepare
from tests.server.grid import InProcessGrid, context
from tests.server.small_run import Killed

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

USERS = ("ann", "bob", "cleo", "dan", "eve")


@pytest.fixture
def overrides(tmp_path: Path, config_path: Path) -> dict[str, Any]:
    public = tmp_path / "public.jsonl"
    lines = [{"user_id": "p", "prompt": f"say {n}: ", "completion": "anything"} for n in range(6)]
    public.write_text("\n".join(map(json.dumps, lines)))
    for user in USERS[3:]:
        rows = [
            {"user_id": user, "prompt": f"say {n}: ", "completion": f"{user} {n} " * 3} for n in range(14)
        ]
        (tmp_path / "users" / f"{user}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = {"rounds": 1, "local_steps": 2, "personal_steps": 3, "batch_size": 2, "hello_timeout_s": 1}
    federation = {
        "form": "auto",
        "cohort": 2,
        "basis_rank": 4,
        "client_state": str(tmp_path / "clients"),
        **steps,
    }
    told: dict[str, Any] = {f"federation.{name}": value for name, value in federation.items()}
    small = {"data.train_examples": 6, "data.min_examples": 4, "lora.rank": 2, "lora.alpha": 4.0}
    align = {"align.source": str(public), "align.warmup_steps": 2, "align.round_steps": 1, "align.rank": 2}
    return {**told, **small, **align}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Simulation]]:
    """Simulations run in this process: the same apps, and no processes of their own."""
    seen: list[Simulation] = []

    def run(wanted: Simulation, **_: Any) -> dict[str, Any]:
        seen.append(wanted)
        workbench.cache_clear()
        here = context(1)
        here.run_config = {"config": str(wanted.config), "workdir": str(wanted.workdir), "task": wanted.task}
        main(InProcessGrid([{"partition-id": n} for n in range(wanted.users)]), here)
        return dict(json.loads((wanted.workdir / "result.json").read_text()))

    monkeypatch.setattr(simulation, "run", run)
    yield seen


def through(folder: str) -> dict[str, Any]:
    """What the flow does up to the end of the training; gives the result."""
    run = open_run(folder)
    if forms.has_cohort(run):
        basis.make_basis(folder, federate.federate_cohort(folder))
    federate.federate(folder)
    return run.read(federate.RESULT)


def test_a_cohort_makes_the_basis_and_the_others_train_cores_in_it(
    run: Run, config_path: Path, overrides: dict[str, Any], started: list[Simulation]
) -> None:
    folder, registry = str(run.folder), run.registry()
    stages = stage_names(folder, trains=True)
    assert stages[:4] == ("prepare", "cohort", "basis", "federate")
    found = through(folder)
    cohort = set(forms.chosen(run).cohort)
    assert len(cohort) == 2 and found["adapters"].keys() == set(USERS)
    made = registry.get_basis(registry.current_basis(run.base().base))
    cores = {user: registry.get_core(core_id) for user, core_id in found["adapters"].items()}
    assert all(CoreInBasis(core, made) for core in cores.values())
    assert all(max(shape) <= 4 for shape in made.core_shapes().values())

    # the cohort is served by what its own adapters come to, told in the basis
    trained = run.read("federation/cohort/result.json")
    told = run.read(f"basis-{made.id}.json")
    for user in cohort:
        nearest = from_lora(registry.get_adapter(trained["adapters"][user]), made)
        assert nearest.core.content_hash() == cores[user].content_hash()
        assert told["relative_error"][user] == pytest.approx(nearest.error) and nearest.error < 0.5
        assert found["served"][user] == trained["served"][user]

    # both forms are in the log, with the bytes of either
    shared, personal, of_cores = found["rounds"]
    assert [one["mode"] for one in found["rounds"]] == ["shared", "personal", "personal"]
    assert personal["accepted"] == sorted(cohort, key=USERS.index)
    assert sorted(of_cores["accepted"]) == sorted(set(USERS) - cohort)
    sizes = [{row["bytes_up"] for row in one["received"].values()} for one in (personal, of_cores)]
    assert min(sizes[0]) > 3 * max(sizes[1])
    assert found["align"] == trained["align"]

    # everybody's core goes on as any adapter does, and a second attempt finds all of it
    set_id = federate.collect(folder, federate.id_of(found))
    assert {core_id[:2] for core_id in registry.get_set(set_id).values()} == {"c-"}
    evaluation = evaluate(folder, set_id, compress_set(folder, set_id))
    write_report(folder, evaluation)
    forms_told = run.read("report.json")["federation"]["forms"]
    assert {form: told["users"] for form, told in forms_told.items()} == {"float32": 2, "core": 3}
    kept = {row["user"]: (row["personal"], row["compressed"]) for row in run.read(evaluation)["losses"]}
    for user, served in found["served"].items():
        if served == PERSONAL:  # in float32 what is stored is what was trained
            assert kept[user][1] == pytest.approx(kept[user][0], abs=1e-5)
    count = len(started)
    assert prepare(str(config_path), overrides) == folder
    assert through(folder) == found and len(started) == count

    # a later run, of one user more, trains cores for all straight away
    rows = [{"user_id": "fay", "prompt": f"say {n}: ", "completion": f"fay {n} " * 3} for n in range(14)]
    Path(run.config.data.source, "fay.jsonl").write_text("\n".join(map(json.dumps, rows)))
    later = prepare(str(config_path), overrides)
    assert "cohort" not in stage_names(later, trains=True)
    assert through(later)["adapters"].keys() == {*USERS, "fay"} and len(started) == count + 1
    assert registry.current_basis(run.base().base) == made.id


@pytest.mark.long
def test_a_killed_attempt_goes_on_in_the_basis_it_had(
    run: Run, config_path: Path, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(run.folder)
    cohort = federate.federate_cohort(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "use_basis", _killed)
        with pytest.raises(Killed):
            basis.make_basis(folder, cohort)
    with pytest.raises(FederationError, match="names no basis"):
        federate.federate(folder)
    made = basis.make_basis(folder, cohort)
    assert prepare(str(config_path), overrides) == folder  # and not as a run in whose registry a basis is
    assert forms.has_cohort(run) and forms.chosen(run).basis_id == made
    assert basis.make_basis(folder, federate.federate_cohort(folder)) == made
    federate.federate(folder)
    with pytest.raises(FederationError, match="asked for f-0"):
        basis.make_basis(folder, "f-0")


def _killed(*_: Any) -> None:
    raise Killed


def test_cores_without_a_basis_in_force_are_refused_and_named_by_it_where_there_is_one(
    run: Run, config_path: Path, overrides: dict[str, Any]
) -> None:
    straight = {**overrides, "federation.form": "core"}
    with pytest.raises(ConfigError, match="has no basis in force .* federation.form = 'auto' makes one"):
        prepare(str(config_path), straight)
    made = basis.make_basis(str(run.folder), federate.federate_cohort(str(run.folder)))
    first = prepare(str(config_path), straight)
    assert forms.chosen(open_run(first)) == chosen_basis.ChosenBasis(made)
    assert through(first)["basis"] == made
    registry = run.registry()
    other = registry.get_basis(made)
    sides = {name: (u * 2, v) for name, (u, v) in other.sides.items()}
    registry.use_basis(registry.put_basis(type(other)(sides, other.base_model, other.base_hash)))
    assert prepare(str(config_path), straight) != first


def test_around_the_shared_adapter_everybody_trains_a_core_from_exactly_there(
    run: Run, config_path: Path, overrides: dict[str, Any]
) -> None:
    wide = {"federation.basis_of": "shared", "federation.basis_modules": ["down_proj"]}
    folder = prepare(str(config_path), {**overrides, **wide})
    found, own = through(folder), open_run(folder)
    cohort = set(forms.chosen(own).cohort)
    assert len(cohort) == 2 and sorted(found["adapters"]) == sorted(USERS)
    registry = own.registry()
    made = registry.get_basis(registry.current_basis(own.base().base))
    for name, shape in made.core_shapes().items():
        assert shape == ((6, 6) if name.endswith("down_proj") else (2, 2))
    assert [one["mode"] for one in found["rounds"]] == ["shared", "personal", "personal"]
    assert sorted(found["rounds"][-1]["accepted"]) == sorted(USERS)  # the cohort too

    # the start is what the cohort averaged, and some core has gone on from there
    averaged = adapters.read(own.folder / "federation" / "cohort" / "shared")
    told = from_lora(averaged, made)
    assert told.error < 1e-5
    begun = core_folder.read(own.folder / "federation" / found["shared_core"])
    assert begun.content_hash() == told.core.content_hash()
    ended = [registry.get_core(core_id) for core_id in found["adapters"].values()]
    assert all(CoreInBasis(core, made) for core in ended)
    assert any(core.content_hash() != begun.content_hash() for core in ended)
    for core in ended:  # beside that, which stays bit for bit
        for name, s in core.cores.items():
            stays = begun.cores[name]
            assert torch.equal(s[:2], stays[:2]) and torch.equal(s[:, :2], stays[:, :2])
    numbers = wire_core.numbers(made, own_rank=0)
    assert numbers == 16 * sum(name.endswith("down_proj") for name in made.sides)
    sent = {row["bytes_up"] for row in found["rounds"][-1]["received"].values()}
    assert max(sent) < 4 * numbers + 2000  # numbers and what else a reply says, but nothing in common
    assert own.read(f"basis-{made.id}.json")["relative_error"] == {}


def test_a_cohort_learns_the_directions_that_cores_are_told_in(
    run: Run, config_path: Path, overrides: dict[str, Any], started: list[Simulation]
) -> None:
    learnt = {"basis_of": "learnt", "basis_modules": ["down_proj"], "basis_rounds": 2, "basis_steps": 3}
    told = {f"federation.{name}": value for name, value in learnt.items()}
    folder = prepare(str(config_path), {**overrides, **told})
    found, own = through(folder), open_run(folder)
    assert [one.task for one in started] == [simulation.LEARN, simulation.FEDERATE]
    assert sorted(found["adapters"]) == sorted(USERS)
    cohort = own.folder / "federation" / "cohort"
    averaged, directions = (
        adapters.read(cohort / "shared"),
        basis_file.read(cohort / "directions.safetensors"),
    )
    made = own.registry().get_basis(found["basis"])
    assert made.id == around(averaged, directions).id and made.base == own.base().base

    # all directions are orthonormal, of the projections named, and have moved from where they were drawn
    shapes = {name: (o, i) for name, (o, _, i) in averaged.shapes().items()}
    begun = drawn(shapes, 4, seed=own.config.seed, modules=["down_proj"])
    assert directions.sides.keys() == begun.sides.keys()
    for name, (u, v) in directions.sides.items():
        for side, before in zip((u, v), begun.sides[name], strict=True):
            assert torch.allclose(side.mT @ side, torch.eye(4), atol=1e-5)
            assert not torch.allclose(side, before, atol=1e-5)

    # who learnt them is told of, with what it cost; cores begin beside, and no core of the cohort was sent
    modes = [one["mode"] for one in found["rounds"]]
    assert modes == ["shared", "personal", "basis", "basis", "personal"]
    assert [one["round"] for one in found["rounds"]] == [1, 2, 3, 4, 5]
    numbers = 4 * sum(sum(shape) for shape in directions.module_shapes().values())
    for one in found["rounds"][2:4]:
        assert one["accepted"] == list(forms.chosen(own).cohort)
        assert 4 * numbers <= one["bytes_up"] / 2 < 4 * numbers + 4000
    result = own.read("federation/cohort/result.json")
    assert result["served"].keys() == set(forms.chosen(own).cohort)
    assert wire_core.numbers(made, own_rank=0) == 16 * len(directions.sides)


def test_more_learnt_directions_than_there_is_room_for_are_refused(
    run: Run, config_path: Path, overrides: dict[str, Any]
) -> None:
    wide = {"federation.basis_of": "learnt", "federation.basis_rank": 1000}
    with pytest.raises(ConfigError, match=r"basis_rank = 1000: .*room for \d+ .*allowed .*: 1 to \d+"):
        prepare(str(config_path), {**overrides, **wide})


def test_a_basis_of_modules_that_are_not_adapted_is_refused_before_anybody_trains(
    run: Run, config_path: Path, overrides: dict[str, Any]
) -> None:
    wrong = {"federation.basis_of": "shared", "federation.basis_modules": ["down_proj", "lm_head"]}
    why = r"\['down_proj', 'lm_head'\]: lm_head is not adapted; allowed: some of q_proj, v_proj"
    with pytest.raises(ConfigError, match=why):
        prepare(str(config_path), {**overrides, **wrong})


@pytest.mark.parametrize(("size", "allowed"), [(5, "2 to 4"), (6, "2 to 4")])
def test_a_cohort_of_everybody_is_refused(
    run: Run, config_path: Path, overrides: dict[str, Any], size: int, allowed: str
) -> None:
    with pytest.raises(ConfigError, match=f"federation.cohort = {size}: 5 users take part.*{allowed}"):
        prepare(str(config_path), {**overrides, "federation.cohort": size})


def test_the_cohort_is_drawn_by_the_seed(run: Run) -> None:
    from dataclasses import replace

    drawn = {choosing.cohort(replace(run.config, seed=seed)) for seed in range(8)}
    assert len(drawn) > 1 and choosing.cohort(run.config) == choosing.cohort(run.config)
    assert all(list(one) == sorted(one, key=USERS.index) for one in drawn)
