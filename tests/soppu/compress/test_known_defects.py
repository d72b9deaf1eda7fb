"""One test for each known defect of earlier joint-compression code; the line above each says what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode

from soppu import adapter
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.fleet.passes import Passes
from soppu.compress.fleet.survey import survey
from soppu.compress.linalg import tucker
from soppu.compress.methods import shared_basis

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "adapters"
EXACT = CompressOptions(method="joint", rank=64, basis_bits=32, core_bits=32)
EXACT_AT_3 = replace(EXACT, rank=3, max_steps=1, tolerance=0.0)
Fleet = Callable[..., dict[str, LoraAdapter]]


# 1. The shared rank was clamped to the LoRA rank, which made more than two users hopeless.
def test_shared_rank_may_exceed_the_lora_rank(fleet: Fleet):
    bundle = compress(fleet((2,) * 5), EXACT)
    assert set(bundle.report.k_used.values()) == {10}
    assert bundle.report.relative_error_max < 1e-6


# 2. Adapters were not normalised: of two whose norms differ 300 times, the small one was erased.
def test_a_weak_adapter_is_not_erased_by_a_strong_one(fleet: Fleet):
    adapters = fleet((2, 2), shapes={"q": (30, 30)})
    pair = adapters["user0"].pairs["q"]
    adapters["user0"] = LoraAdapter({"q": LoraPair(pair.A, pair.B * 300)}, "tiny", "b" * 64)
    errors = compress(adapters, CompressOptions(method="joint", rank=3)).report.relative_error
    assert errors["user1"] < 0.6
    plain = compress(
        fleet((2, 2), shapes={"q": (30, 30)}), CompressOptions(method="joint", rank=3)
    ).report.relative_error
    assert errors == pytest.approx(plain, rel=1e-3)


# 3a. alpha / r was ignored: what was compressed was not what the model adds.
def test_the_lora_scale_is_in_what_is_compressed(fleet: Fleet, tmp_path: Path):
    made = fleet((2,), shapes={"model.layers.0.self_attn.q_proj": (8, 6)})["user0"]
    adapter.write(made, tmp_path / "u")
    config = json.loads((tmp_path / "u" / adapter.CONFIG_FILE).read_text())
    config["lora_alpha"], config["alpha_pattern"] = 6, {}
    (tmp_path / "u" / adapter.CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / "u" / adapter.IDENTITY_FILE).unlink()  # as if another program had written the folder
    (pair,) = compress({"u": adapter.read(tmp_path / "u")}, EXACT).reconstruct("u").pairs.values()
    (own,) = made.pairs.values()
    torch.testing.assert_close(pair.delta(), 3 * own.delta(), rtol=1e-5, atol=1e-5)


# 3b. All adapters had to have one rank.
def test_ranks_may_differ_between_users(fleet: Fleet):
    adapters = fleet((1, 4, 2, 3, 2))
    bundle = compress(adapters, EXACT)
    assert bundle.report.relative_error_max < 1e-6
    for user, own in adapters.items():
        assert bundle.reconstruct(user).shapes() == own.shapes()


# 4. Every adapter was compared with every adapter's core: errors of 30 to 80 where 1 is the most.
def test_each_adapter_is_compared_with_its_own_core_only(fleet: Fleet):
    adapters = fleet((2,) * 4)
    report = compress(adapters, CompressOptions(method="joint", rank=3)).report
    for errors in report.module_error.values():
        assert errors.keys() == adapters.keys()
        assert all(0 <= error <= 1 for error in errors.values())
    scaled = {
        user: LoraAdapter({m: LoraPair(p.A, p.B * 100**n) for m, p in a.pairs.items()}, "tiny", "b" * 64)
        for n, (user, a) in enumerate(adapters.items())
    }
    again = compress(scaled, CompressOptions(method="joint", rank=3)).report
    for name, errors in report.module_error.items():
        assert again.module_error[name] == pytest.approx(errors, rel=1e-2)


# 5. V was updated with the old U (Jacobi), which need not raise the objective.
def test_v_is_updated_with_the_new_u(factors):
    outs, ins = factors((2,) * 6, 14, 12, shared=12)
    units = torch.stack([b @ a / (b @ a).norm() for b, a in zip(outs, ins, strict=True)])

    def top(grams: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(grams.sum(0)).eigenvectors[:, -3:]

    u0, v0 = top(units @ units.mT), top(units.mT @ units)
    u1 = top(units @ v0 @ v0.T @ units.mT)
    after = {name: top(units.mT @ u @ u.T @ units) for name, u in (("new", u1), ("old", u0))}
    energy = {name: float((u1.T @ units @ v).square().sum()) for name, v in after.items()}
    assert energy["new"] > energy["old"] + 1e-6
    pairs = {f"user{n}": LoraAdapter({"q": LoraPair(A=ins[n], B=outs[n])}, "tiny") for n in range(6)}
    # the ranges hold all columns, and finding that out takes one step; the fit goes on from there
    ranges = shared_basis.grow_ranges(
        Passes(survey(pairs, device=torch.device("cpu")), {}), EXACT_AT_3, progress=lambda *_: None
    )
    assert ranges.grown["q"].found.objective[1] == pytest.approx(energy["new"], rel=1e-6)
    u2 = top(units @ after["new"] @ after["new"].T @ units.mT)
    v2 = top(units.mT @ u2 @ u2.T @ units)
    left = 6 - float((u2.T @ units @ v2).square().sum())
    report = compress(pairs, EXACT_AT_3).report
    assert sum(e**2 for e in report.relative_error.values()) == pytest.approx(left, rel=1e-5)


# 6a. The start was random and unseeded: no two runs agreed.
def test_two_runs_agree_whatever_the_random_state(fleet: Fleet):
    torch.manual_seed(1)
    first = compress(fleet(), CompressOptions(method="joint", rank=3)).to_bytes()
    torch.manual_seed(2)
    assert compress(fleet(), CompressOptions(method="joint", rank=3)).to_bytes() == first


# 6b. It ran 100 steps whether or not anything was gained.
def test_it_stops_when_nothing_is_gained(fleet: Fleet):
    steps = compress(fleet(), CompressOptions(method="joint", rank=3, max_steps=100)).report.steps
    assert max(steps.values()) < 40
    assert set(compress(fleet(), EXACT).report.steps.values()) == {0}
    stop = tucker.Stop(max_steps=9, least=0.0, ceiling=4.0)
    assert tucker.fit_cores(torch.eye(4)[None], torch.eye(4)[None], rank=4, stop=stop).steps == 0


class _LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


# 7. Dense o x i, o x o and i x i matrices were formed, in float64, for every adapter and step.
@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(method="joint", rank=2),
        CompressOptions(method="joint", rank=64, tolerance=0.0),
        CompressOptions(max_error=0.3),
        CompressOptions(method="ternary"),
    ],
    ids=lambda options: f"{options.method}-{options.rank}",
)
def test_no_dense_matrix_is_formed(fleet: Fleet, options: CompressOptions):
    adapters = fleet((2, 2, 2), shapes={"q": (1300, 1100)})
    with _LargestTensor() as seen:
        bundle = compress(adapters, options)
        bundle.reconstruct("user1")
    # a batch of all six columns is 7,800 numbers; what a quantiser is chosen with is a few times as much.
    # Up to 1,024 features a side's Gram matrix is summed up once, for an exact certificate.
    assert 1300 * 6 <= seen.numbers < 300_000 < 1100 * 1100


# 8a. The numpy loader could not read bfloat16.
def test_bfloat16_adapters_are_read_and_compressed(fleet: Fleet, tmp_path: Path):
    for user, made in fleet((2, 2), dtype=torch.bfloat16).items():
        adapter.write(made, tmp_path / user)
    adapters = {user: adapter.read(tmp_path / user) for user in ("user0", "user1")}
    assert next(iter(adapters["user0"].pairs.values())).A.dtype == torch.bfloat16
    assert compress(adapters, EXACT).report.relative_error_max < 1e-6


# 8b. Only q and v of `self_attn` were found; every other module was dropped without a word.
def test_modules_of_any_name_are_compressed(fleet: Fleet):
    shapes = {"h.0.attn.c_attn": (9, 6), "model.layers.0.mlp.down_proj": (6, 8), "lm_head": (12, 6)}
    adapters = fleet((1, 1), shapes=shapes)
    bundle = compress(adapters, EXACT)
    assert bundle.shapes.keys() == bundle.reconstruct("user0").pairs.keys() == shapes.keys()


# 9. The basis was saved once for every name that used it: the output was larger than the input.
def test_basis_is_saved_once_not_per_user(fleet: Fleet):
    sizes = {}
    for n in (4, 8):
        options = CompressOptions(method="joint", rank=4)
        bundle = compress(fleet((4,) * n, shapes={"q": (300, 300)}), options)
        sizes[n] = len(load(bundle.to_bytes())["bases"])
        assert 0.7 * 4 * 600 < sizes[n] < 1.1 * 4 * 600
        assert len(bundle.to_bytes()) < 2 * bundle.report.parameters_before
    assert sizes[8] < 1.05 * sizes[4]


# 10. The cores were left out of the compressed size.
@pytest.mark.parametrize("k", [3, 5])
def test_size_counts_the_cores(fleet: Fleet, k: int):
    options = CompressOptions(method="joint", rank=k)
    bundle = compress(fleet((2,) * 5), options)
    stored = sum(len(bundle.components(0)[m]) for m in range(2))
    core = k * k + k if k <= 4 else 2 * k * 2 + 2
    assert bundle.report.parameters_after == sum(k * (o + i) + 5 * core for o, i in ((20, 16), (12, 30)))
    assert stored == 2 * 5 * (k if k <= 4 else 2)
    assert bundle.report.parameters_before == 5 * 2 * (20 + 16 + 12 + 30)
    assert len(bundle.to_bytes()) == sum(map(len, load_bytes(bundle.to_bytes())))


def load_bytes(data: bytes) -> list[bytes]:
    """The header and all tensors of a safetensors file: nothing lies beside them."""
    header = 8 + int.from_bytes(data[:8], "little")
    return [data[:header], *(t.contiguous().view(torch.uint8).numpy().tobytes() for t in load(data).values())]


# 11. Cores were put in order by their names as text: S_10 came before S_2.
def test_core_order_survives_more_than_ten_users(fleet: Fleet):
    adapters = fleet((1,) * 12)
    bundle = Bundle.from_bytes(compress(adapters, EXACT).to_bytes())
    assert bundle.users == tuple(adapters)
    for user, own in adapters.items():
        for name, pair in bundle.reconstruct(user).pairs.items():
            torch.testing.assert_close(pair.delta(), own.pairs[name].delta(), rtol=1e-4, atol=1e-4)


# 12a. "Reconstruction" wrote an identity for A and the first r columns of the delta for B.
def test_reconstruction_is_the_whole_delta(fleet: Fleet):
    adapters = fleet((2, 3, 2))
    bundle = compress(adapters, EXACT)
    for user, own in adapters.items():
        for name, pair in bundle.reconstruct(user).pairs.items():
            assert pair.A.shape == own.pairs[name].A.shape and pair.B.shape == own.pairs[name].B.shape
            torch.testing.assert_close(pair.delta(), own.pairs[name].delta(), rtol=1e-4, atol=1e-4)


# 12b. Names were matched by prefix: "adapters" also took the tensors of "adapters2".
def test_names_that_begin_alike_stay_apart(fleet: Fleet):
    shapes = {"layers.1.q": (9, 6), "layers.10.q": (6, 9), "layers.1.q.U": (7, 5)}
    made = list(fleet((1, 1), shapes=shapes).values())
    bundle = compress({"adapters": made[0], "adapters2": made[1]}, EXACT)
    again = Bundle.from_bytes(bundle.to_bytes())
    for user, own in zip(("adapters", "adapters2"), made, strict=True):
        assert again.reconstruct(user).pairs.keys() == shapes.keys()
        for name, pair in again.reconstruct(user).pairs.items():
            torch.testing.assert_close(pair.delta(), own.pairs[name].delta(), rtol=1e-4, atol=1e-4)


# 13. One basis was shared across layers of the same shape, which is another model than one across users.
def test_every_module_has_a_basis_of_its_own(fleet: Fleet):
    shapes = {"layers.0.q": (20, 16), "layers.1.q": (20, 16)}
    both = compress(fleet((2, 2), shapes=shapes), CompressOptions(method="joint", rank=3))
    (u0, _), (u1, _) = both.matrices("layers.0.q"), both.matrices("layers.1.q")
    assert u0 is not None and u1 is not None and not torch.allclose(u0, u1, atol=0.1)


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters are not on this machine")
def test_three_real_adapters_compress_as_measured(tmp_path: Path):
    adapters = {folder.name: adapter.read(folder) for folder in sorted(REAL.iterdir()) if folder.is_dir()}
    parameters = sum(held.parameters() for held in adapters.values())
    # at 16 bits a number, everything in the file counted; what mixed-width SVD without entropy coding reaches
    for ratio, limit in ((8, 0.096), (64, 0.572)):
        bundle = compress(adapters, CompressOptions(ratio=ratio))
        assert len(bundle.to_bytes()) <= 2 * parameters / ratio
        assert bundle.report.relative_error_rms <= limit
        assert bundle.reconstruct("gpt2-legal").fan_in_fan_out
    joint_fit = compress(adapters, CompressOptions(method="joint", rank=8, basis_bits=16, core_bits=16))
    assert joint_fit.report.relative_error_mean == pytest.approx(0.168, abs=0.005)
    exact = CompressOptions(method="joint", rank=24, basis_bits=32, core_bits=32)
    assert compress(adapters, exact).report.relative_error_max < 1e-5
