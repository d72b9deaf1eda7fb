from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fleets, rivals
from benchmarks.fleets import Fleet, FleetSpec
from benchmarks.rivals import Setting
from soppu import adapter as peft
from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError, ConfigError, SoppuError

SPEC = FleetSpec(4, r=2, shapes={"model.layers.0.q": (24, 16), "model.layers.0.v": (16, 24)}, seed=5)
SQUARE = replace(SPEC, shapes={"model.layers.0.q": (16, 16), "model.layers.0.v": (16, 16)})
installed = pytest.mark.skipif(not rivals.PYTHON.exists(), reason="run sh benchmarks/rivals_env.sh")


def scaled(adapter: LoraAdapter, factor: float) -> LoraAdapter:
    return replace(
        adapter, pairs={name: LoraPair(pair.A, pair.B * factor) for name, pair in adapter.pairs.items()}
    )


def test_squared_errors_are_those_of_the_dense_matrices() -> None:
    one, two = fleets.user(SPEC, 0), fleets.user(SPEC, 1)
    difference, total = rivals.squared(one, two)
    dense = [(pair.delta().double(), two.pairs[name].delta().double()) for name, pair in one.pairs.items()]
    assert difference == pytest.approx(sum(float((x - y).square().sum()) for x, y in dense), rel=1e-5)
    assert total == pytest.approx(sum(float(x.square().sum()) for x, _ in dense), rel=1e-5)


def test_the_measures_weigh_users_as_they_say() -> None:
    fleet = dict(Fleet(SPEC))
    first, *others = fleet
    found = rivals.errors(fleet, fleet | {first: scaled(fleet[first], 0.5)})
    energy = {who: rivals.squared(made, made)[1] for who, made in fleet.items()}
    assert found.overall == pytest.approx(math.sqrt(0.25 / 4))
    assert found.pooled == pytest.approx(math.sqrt(0.25 * energy[first] / sum(energy.values())))
    assert found.worst_user == first and found.worst == pytest.approx(0.5)
    assert max(found.users[who] for who in others) < 1e-12


def test_zero_adapters_count_as_nothing_unless_they_came_back_as_something() -> None:
    made = fleets.user(SPEC, 0)
    zero = scaled(made, 0.0)
    assert rivals.errors({"a": zero}, {"a": zero}).overall == 0
    assert math.isinf(rivals.errors({"a": zero}, {"a": made}).worst)


def test_lost_users_and_modules_are_refused() -> None:
    made = fleets.user(SPEC, 0)
    half = replace(made, pairs=dict(list(made.pairs.items())[:1]))
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.v"):
        rivals.errors({"a": made}, {"a": half})
    with pytest.raises(AdapterError, match="2 users before, 1 after"):
        rivals.errors({"a": made, "b": made}, {"a": made})


@pytest.mark.parametrize(("package", "storage"), [("zip", "float32"), ("lorashare", "nf4")])
def test_unknown_packages_and_storages_are_refused(package: str, storage: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vlora.*nf4"):
        rivals.compress(package, {}, Setting(1, storage), tmp_path)


def test_a_sweep_ends_where_nothing_more_can_be_gained(tmp_path: Path) -> None:
    folders = fleets.write(SPEC, tmp_path)
    assert {s.k for s in rivals.sweep("vlora", folders)} == {1, 2, 4}
    assert {s.k for s in rivals.sweep("lorashare", folders)} == {1, 2, 4, 8}


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("package", "k"), [("copy", 1), ("lorashare", 16), ("vlora", 4)])
def test_a_package_that_keeps_everything_gives_no_error(package: str, k: int, tmp_path: Path) -> None:
    """Read from folders whose scale alpha / r is not 1, so that one side forgetting it would show."""
    folders = fleets.write(SQUARE, tmp_path / "fleet")
    for folder in folders.values():
        config = json.loads((folder / peft.CONFIG_FILE).read_text()) | {"lora_alpha": 32}
        (folder / peft.CONFIG_FILE).write_text(json.dumps(config))
        (folder / peft.IDENTITY_FILE).unlink()
    made = rivals.run(package, folders, Setting(k), tmp_path / "work")
    found = rivals.errors(rivals.Folders(folders), made.reconstructed)
    assert found.worst < 1e-5
    on_disk = [path for path in (tmp_path / "work" / "artefact").rglob("*") if path.is_file()]
    assert made.bytes_on_disk == sum(path.stat().st_size for path in on_disk) > made.tensor_bytes > 0
    assert made.cost.seconds > 0 and made.peak_memory >= made.cost.baseline_memory > 1 << 20
    one = peft.read(next(iter(folders.values())))
    torch.testing.assert_close(
        one.pairs["model.layers.0.q"].B, 16 * fleets.user(SQUARE, 0).pairs["model.layers.0.q"].B
    )


@installed
@pytest.mark.slow
def test_a_trimmed_artefact_is_what_compressing_at_that_k_gives(tmp_path: Path) -> None:
    folders = fleets.write(SQUARE, tmp_path / "fleet")
    direct = rivals.run("lorashare", folders, Setting(3), tmp_path / "direct")
    found = rivals.errors(rivals.Folders(folders), direct.reconstructed)
    trimmed = rivals.curve("lorashare", folders, tmp_path / "curve", [Setting(3), Setting(16)])
    assert [point.k_used for point in trimmed] == [3, 16]
    assert trimmed[0].overall == pytest.approx(found.overall, rel=1e-4)
    assert trimmed[0].tensor_bytes == direct.tensor_bytes
    assert 0.05 < trimmed[0].overall < 1 and trimmed[1].overall < 1e-5


@installed
@pytest.mark.slow
def test_a_package_that_fails_is_heard(tmp_path: Path) -> None:
    one = dict(list(fleets.write(SPEC, tmp_path / "fleet").items())[:1])
    with pytest.raises(SoppuError, match="lorashare, compress: exit 1: .*at least 2 valid adapters"):
        rivals.run("lorashare", one, Setting(1), tmp_path / "work")
