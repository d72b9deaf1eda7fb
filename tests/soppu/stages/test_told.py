"""Stages on users who are cores: which basis a set is told in, what is kept of their gain, who may mix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from soppu.compress import Bundle
from soppu.compress.joining import basis_of
from soppu.cores.basis import CoreBasis
from soppu.cores.projecting import from_lora
from soppu.errors import RegistryError
from soppu.stages import told
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.refit import judged
from soppu.stages.report import write_report
from soppu.stages.run import Run, open_run, prepare
from tests.soppu.stages.conftest import train, write_result


def compressed(run: Run, members: dict[str, str]) -> Bundle:
    """The bundle that the stage makes of these users, read again."""
    registry = run.registry()
    bundle_id = compress_set(str(run.folder), registry.freeze(members))
    return Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)


@pytest.fixture
def basis(run: Run, trained: dict[str, str]) -> CoreBasis:
    """The basis of the cohort's bundle, as a first run leaves it."""
    return basis_of(compressed(run, trained))


def as_cores(run: Run, adapters: dict[str, str], basis: CoreBasis) -> dict[str, str]:
    """These users' adapters as cores with a rank of their own, stored; user -> core id."""
    registry = run.registry()
    registry.put_basis(basis)
    found = {}
    for user, held in adapters.items():
        core = from_lora(registry.get_adapter(held), basis, own_rank=1).core
        found[user] = registry.put_adapter(core, user=user, run=run.id)
    return found


def turned(basis: CoreBasis) -> CoreBasis:
    """Another basis of the same span: columns of length 1 in other directions."""
    sides = {}
    for name, both in basis.sides.items():
        made = []
        for side in both:
            draw = torch.Generator().manual_seed(len(made))
            columns = side @ torch.randn(side.shape[1], side.shape[1], generator=draw)
            made.append(columns / columns.norm(dim=0))
        sides[name] = (made[0], made[1])
    return dataclasses.replace(basis, sides=sides)


def test_cores_are_kept_with_all_of_their_gain_and_as_stored_with_nearly_all(
    run: Run, trained: dict[str, str], basis: CoreBasis, config_path: Path
) -> None:
    cores = as_cores(run, trained, basis)
    write_result(run, cores)
    for bits, least in ((32, 1 - 1e-6), (8, 0.995)):
        options = {"compress.basis_bits": bits, "compress.core_bits": bits}
        one = open_run(prepare(str(config_path), options))
        bundle = compressed(one, cores)
        assert bundle.report.method == "cores" and bundle.adapter_ids == tuple(cores.values())
        assert (basis_of(bundle).id == basis.id) or bits == 8
        bundle_id = bundle.save(one.folder / "bundle")
        set_id = one.registry().freeze(cores)
        verdict = one.read(evaluate(str(one.folder), set_id, bundle_id))["verdict"]
        assert verdict["passed"] and verdict["mean_gain_kept"] >= least
        assert verdict["worst_gain_kept"] >= least and verdict["mean_gain_kept"] < 1.005
        report = one.read(f"compression-{bundle_id[:16]}.json")
        registry = one.registry()
        assert report["bytes_before"] == sum(registry.adapter_bytes(held) for held in cores.values())


def test_which_basis_a_set_is_told_in(run: Run, trained: dict[str, str], basis: CoreBasis) -> None:
    registry, base = run.registry(), run.base().base
    cores = as_cores(run, trained, basis)
    other = turned(basis)
    moved = as_cores(run, {"bob": trained["bob"]}, other)
    mixed = {**trained, "ann": cores["ann"]}
    both = {**cores, **moved}

    def found(members: dict[str, str]) -> str:
        return told.of_set(registry, registry.freeze(members), base)

    stages = ("federate-cohort", "basis", "federate", "compress", "evaluate")
    before = {stage: run.inputs(stage) for stage in stages}
    assert (found(trained), found(cores), found(mixed)) == ("", basis.id, "")
    assert found({**mixed, **moved}) == ""  # two joined on different days: everybody is fitted anew
    several = rf"several bases: {min(basis.id, other.id)} \(\d users\), {max(basis.id, other.id)}"
    with pytest.raises(RegistryError, match=several):
        compressed(run, both)
    registry.use_basis(other.id)
    # cached results of what is told in a basis are void, and of nothing else: least of all of what makes one
    assert [stage for stage in stages if run.inputs(stage) != before[stage]] == ["compress", "evaluate"]
    assert [found(one) for one in (trained, cores, mixed, both)] == ["", other.id, other.id, other.id]


def test_with_a_basis_in_force_cores_are_carried_over_and_adapters_projected(
    run: Run, trained: dict[str, str], basis: CoreBasis
) -> None:
    registry = run.registry()
    registry.use_basis(registry.put_basis(basis))
    assert registry.current_basis(run.base().base) == basis.id
    other = turned(basis)
    ann, bob = ({user: trained[user]} for user in ("ann", "bob"))
    members = {**trained, **as_cores(run, ann, basis), **as_cores(run, bob, other)}
    bundle = compressed(run, members)
    assert basis_of(bundle).id == basis.id and bundle.adapter_ids == tuple(members.values())
    errors = bundle.report.relative_error
    assert errors["ann"] < 1e-6 and errors["bob"] < 1e-4
    wanted = from_lora(registry.get_adapter(trained["cleo"]), basis).error
    assert errors["cleo"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_users_are_carried_over_to_a_refit_basis_without_training(
    run: Run, trained: dict[str, str], basis: CoreBasis
) -> None:
    registry = run.registry()
    other = turned(basis)
    registry.put_basis(other)
    name, (u, v) = next(iter(other.sides.items()))
    cut = dataclasses.replace(other, sides={**other.sides, name: (u[:, :1].contiguous(), v)})
    registry.put_basis(cut)
    ann, bob = ({user: trained[user]} for user in ("ann", "bob"))
    members = {**trained, **as_cores(run, ann, basis), **as_cores(run, bob, other)}
    found = told.carry_over(registry, other.id, members, run="refit")
    assert registry.told_in(found.cores.values()) == dict.fromkeys(found.cores.values(), other.id)
    assert registry.current_set() == found.cores and found.cores["bob"] == members["bob"]
    assert found.errors["bob"] == 0 and 0 < found.errors["ann"] < 1e-4
    assert found.errors["cleo"] == pytest.approx(
        from_lora(registry.get_adapter(trained["cleo"]), other).error
    )
    assert [row.run for row in registry.history("ann")] == [run.id, run.id, "refit"]
    assert registry.history("ann")[-1].metrics == {"carried_error": found.errors["ann"]}
    lost = told.carry_over(registry, cut.id, found.cores)
    for user, core_id in lost.cores.items():
        before, after = (registry.get_adapter(one) for one in (found.cores[user], core_id))
        whole = sum(float(pair.delta().square().sum()) for pair in before.pairs.values())
        left = sum(
            float((pair.delta() - after.pairs[module].delta()).square().sum())
            for module, pair in before.pairs.items()
        )
        assert (
            lost.errors[user] == pytest.approx((left / whole) ** 0.5, rel=1e-3) and lost.errors[user] > 0.01
        )
    with pytest.raises(RegistryError, match="unknown basis"):
        told.carry_over(registry, "u-0", members)


def test_who_trained_freely_beside_a_core_says_whether_the_basis_fits(
    run: Run, trained: dict[str, str], basis: CoreBasis
) -> None:
    registry, folder = run.registry(), str(run.folder)
    cores = as_cores(run, trained, basis)
    write_result(run, cores)
    assert judged(run, cores) is None  # no basis is in force
    with pytest.raises(RegistryError, match=f"{basis.id} was never put in force"):
        registry.free_since_basis(basis.id, limit=9)
    registry.use_basis(basis.id)
    set_id = registry.freeze(cores)
    bundle_id = compress_set(folder, set_id)
    nobody = run.read(evaluate(folder, set_id, bundle_id))["basis"]
    assert nobody["basis_id"] == basis.id and nobody["probes"] == [] and not nobody["due"]
    free = {user: registry.put_adapter(train(run, user, steps=15), user=user) for user in ("ann", "bob")}
    shared = {user: registry.put_adapter(train(run, "bob", steps=2), user=user) for user in ("dan", "eve")}
    for user in ("ann", "bob"):
        registry.put_adapter(registry.get_core(cores[user]), user=user, run="again")
    assert len(set(shared.values())) == 1 and registry.free_since_basis(basis.id, limit=9) == free
    assert registry.free_since_basis(basis.id, limit=1) == {"bob": free["bob"]}
    evaluation = evaluate(folder, set_id, bundle_id)
    found = run.read(evaluation)["basis"]
    assert [one["adapter_id"] for one in found["probes"]] == list(free.values())
    errors = [from_lora(registry.get_adapter(held), basis).error for held in free.values()]
    assert [one["error"] for one in found["probes"]] == pytest.approx(errors)
    losses = {one["user"]: one for one in run.read(evaluation)["losses"]}
    for one in found["probes"]:  # over the shared adapter, on the text that the gate measures on
        told_ = losses[one["user"]]
        assert one["core_gain"] == pytest.approx(told_["shared"] - told_["personal"], abs=1e-5)
        assert one["gain"] is not None
    write_report(folder, evaluation)
    assert json.loads((run.folder / "report.json").read_text())["basis"] == found


def test_after_a_join_without_a_basis_in_force_everybody_is_fitted_anew(
    run: Run, trained: dict[str, str], basis: CoreBasis
) -> None:
    members = {**trained, **as_cores(run, {"ann": trained["ann"]}, basis)}
    assert compressed(run, members).report.method == "joint"
