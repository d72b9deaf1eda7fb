from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import fleets
from benchmarks.fleets import FleetSpec
from soppu import adapter as peft
from soppu.errors import AdapterError, ConfigError
from tests.soppu.compress import dense_joint

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SMALL = FleetSpec(40, r=4, shapes={Q: (96, 80), V: (32, 80)}, seed=3)


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def test_a_user_depends_on_the_seed_and_the_index_alone() -> None:
    alone = fleets.user(replace(SMALL, n=1000), 17)
    among = fleets.Fleet(SMALL)["user00017"]
    only_q = fleets.user(replace(SMALL, shapes={Q: (96, 80)}), 17)
    assert alone.content_hash() == among.content_hash()
    assert torch.equal(only_q.pairs[Q].B, alone.pairs[Q].B)
    assert fleets.user(replace(SMALL, seed=4), 17).content_hash() != alone.content_hash()
    assert fleets.user(SMALL, 16).content_hash() != alone.content_hash()


def test_a_fleet_is_a_mapping_of_float32_adapters() -> None:
    fleet = fleets.Fleet(SMALL)
    assert len(fleet) == 40 and list(fleet)[:2] == ["user00000", "user00001"]
    made = fleet["user00003"]
    assert made.base_model == "synthetic"
    assert made.shapes() == {Q: (96, 4, 80), V: (32, 4, 80)}
    assert all(t.dtype == torch.float32 for pair in made.pairs.values() for t in (pair.A, pair.B))
    with pytest.raises(KeyError):
        fleet["user00040"]


def test_the_singular_values_have_the_energies_asked_for() -> None:
    spec = replace(SMALL, r=16, shapes={Q: (128, 160)})
    values = torch.linalg.svdvals(fleets.user(spec, 0).pairs[Q].delta().double())[:16].square()
    expected = torch.arange(1, 17, dtype=torch.float64) ** -1.5
    torch.testing.assert_close(values / values.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-6)
    assert 3.5 < float(values.sum() ** 2 / values.square().sum()) < 3.8


@pytest.mark.parametrize(("p_seed", "members"), [(0.0, 0), (0.45, 18), (1.0, 40)])
def test_the_fraction_that_shares_a_is_exact(p_seed: float, members: int) -> None:
    spec = replace(SMALL, p_seed=p_seed)
    assert sum(fleets.shares_seed(spec, index) for index in range(40)) == members


def test_users_of_one_seed_have_close_a_and_the_others_have_their_own() -> None:
    spec = replace(SMALL, r=8, shapes={Q: (64, 512)})
    a = [fleets.user(spec, index).pairs[Q].A for index in range(40)]
    shares = [fleets.shares_seed(spec, index) for index in range(40)]
    same: list[float] = []
    other: list[float] = []
    for first in range(40):
        for second in range(first):
            (same if shares[first] and shares[second] else other).append(cosine(a[first], a[second]))
    # cos of A0 + m and A0 + m' with independent moves of relative size 0.22 to 0.32
    assert min(same) > 1 / (1 + 0.32**2) - 0.05 and max(same) < 1 / (1 + 0.22**2) + 0.05
    assert max(abs(c) for c in other) < 0.1
    assert a[0].std() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.1)


def test_norms_spread_as_in_real_collections() -> None:
    spec = replace(SMALL, n=2000, r=2, shapes={Q: (16, 16)})
    norms = torch.tensor([float(fleets.user(spec, index).pairs[Q].delta().norm()) for index in range(spec.n)])
    low, middle, high = (float(norms.quantile(q)) for q in (0.1, 0.5, 0.9))
    assert 6 < high / low < 9
    assert middle == pytest.approx(spec.norm_median, rel=0.1)


def test_outputs_share_a_subspace_as_far_as_asked() -> None:
    def captured(share: float) -> float:
        spec = replace(SMALL, n=30, r=4, shapes={Q: (400, 32)}, output_share=share, output_width=6)
        made = [torch.linalg.qr(fleets.user(spec, index).pairs[Q].B.double())[0] for index in range(30)]
        values = torch.linalg.svdvals(torch.cat(made, dim=1)).square()
        return float(values[:6].sum() / values.sum())

    assert captured(1.0) > 0.99
    assert captured(0.0) < 0.15
    assert 0.5 < captured(0.6) < 0.75


def test_one_basis_leaves_the_errors_of_the_calibration() -> None:
    """The known squared errors of 40 users at k = 16, 0.71 with a shared A and 0.81 without."""
    for p_seed, expected in ((1.0, 0.71), (0.0, 0.81)):
        spec = FleetSpec(40, shapes={Q: (512, 512)}, p_seed=p_seed)
        made = [fleets.user(spec, index).pairs[Q] for index in range(spec.n)]
        fitted = dense_joint.fit([pair.B for pair in made], [pair.A for pair in made], rank=16, max_steps=3)
        assert fitted.achieved / fitted.total == pytest.approx(expected, abs=0.03)


def test_written_folders_read_back_as_the_same_adapters(tmp_path: Path) -> None:
    spec = replace(SMALL, n=3)
    folders = fleets.write(spec, tmp_path)
    assert list(folders) == list(fleets.Fleet(spec))
    for who, folder in folders.items():
        assert peft.read(folder).content_hash() == fleets.Fleet(spec)[who].content_hash()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 0}, "n 0"),
        ({"r": 33}, "below the rank 33"),
        ({"p_seed": 1.2}, "p_seed: 1.2"),
        ({"shapes": {}}, "0 modules"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 to 39"):
        fleets.user(SMALL, 40)


def test_absent_gpt2_adapters_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPPU_ADAPTERS", str(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match="nowhere/gpt2-legal.*SOPPU_ADAPTERS"):
        fleets.gpt2()


def test_gpt2_adapters_carry_their_scale() -> None:
    try:
        folders = fleets.gpt2_folders()
    except AdapterError as error:
        pytest.skip(str(error))
    made = fleets.gpt2()
    assert set(made) == set(folders) == {"legal", "medical", "sports"}
    assert all(len(adapter.pairs) == 36 and adapter.fan_in_fan_out for adapter in made.values())
    module = "transformer.h.0.attn.c_attn"
    raw = peft._read_tensors(folders["legal"] / peft.WEIGHTS_FILE)
    kept = raw[f"base_model.model.{module}.lora_B.weight"]
    torch.testing.assert_close(made["legal"].pairs[module].B, 2 * kept)  # alpha 16 over rank 8
