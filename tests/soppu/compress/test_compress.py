from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.errors import AdapterError

EXACT = CompressOptions(rank=64, dtype="float32")


def without(adapter: LoraAdapter, module: str) -> LoraAdapter:
    pairs = {name: pair for name, pair in adapter.pairs.items() if name != module}
    return LoraAdapter(pairs, adapter.base_model, adapter.base_hash, adapter.fan_in_fan_out)


def error(adapter: LoraAdapter, other: LoraAdapter) -> float:
    """Relative error over all modules, by dense matrices."""
    assert adapter.pairs.keys() == other.pairs.keys()
    wrong = right = 0.0
    for name, pair in adapter.pairs.items():
        delta: Tensor = pair.delta().double()
        wrong += float((delta - other.pairs[name].delta().double()).square().sum())
        right += float(delta.square().sum())
    return (wrong / right) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [2, 5, 8, 64])
def test_reported_errors_are_those_of_the_reconstructed_adapters(fleet, rank, dtype):
    adapters = fleet((3, 2, 3, 1))
    bundle = compress(adapters, CompressOptions(rank=rank, dtype=dtype))
    for user, adapter in adapters.items():
        expected = error(adapter, bundle.reconstruct(user))
        assert bundle.report.relative_error[user] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_errors_by_module_add_up_to_the_whole(fleet):
    adapters = fleet((3, 2, 3))
    report = compress(adapters, CompressOptions(rank=3)).report
    for user, adapter in adapters.items():
        norms = {name: float(pair.delta().norm()) for name, pair in adapter.pairs.items()}
        wrong = sum((report.module_error[name][user] * norm) ** 2 for name, norm in norms.items())
        total = sum(norm**2 for norm in norms.values())
        assert report.relative_error[user] == pytest.approx((wrong / total) ** 0.5, rel=1e-5)


def test_a_reconstruction_keeps_the_rank_of_the_user_where_cores_are_thin(fleet):
    adapters = fleet((3, 2, 1, 3))
    bundle = compress(adapters, EXACT)
    for user, adapter in adapters.items():
        again = bundle.reconstruct(user)
        assert again.shapes() == adapter.shapes()
        assert error(adapter, again) < 1e-6
        assert (again.base_model, again.base_hash) == ("tiny", "b" * 64)
    assert bundle.modules["model.layers.0.q"].c == 3


def test_a_module_a_user_lacks_stays_away(fleet):
    adapters = fleet((3, 3, 3))
    adapters["user1"] = without(adapters["user1"], "model.layers.1.down")
    bundle = compress(adapters, EXACT)
    assert bundle.reconstruct("user1").pairs.keys() == {"model.layers.0.q"}
    assert bundle.ranks["model.layers.1.down"] == (3, 0, 3)
    assert bundle.report.module_error["model.layers.1.down"].keys() == {"user0", "user2"}
    assert bundle.report.relative_error["user1"] < 1e-6
    two = compress({user: adapters[user] for user in ("user0", "user2")}, EXACT)
    for mine, alone in zip(
        bundle.modules["model.layers.1.down"].tensors().values(),
        two.modules["model.layers.1.down"].tensors().values(),
        strict=True,
    ):
        kept = mine[[0, 2]] if mine.shape[0] == 3 else mine
        torch.testing.assert_close(kept, alone, rtol=0, atol=1e-5)


def test_a_zero_adapter_has_error_zero_and_comes_back_as_zero(fleet):
    adapters = fleet((3, 3))
    fresh = {
        name: LoraPair(pair.A, torch.zeros_like(pair.B)) for name, pair in adapters["user0"].pairs.items()
    }
    adapters["fresh"] = LoraAdapter(fresh, "tiny", "b" * 64)
    bundle = compress(adapters, CompressOptions(rank=4))
    assert bundle.report.relative_error["fresh"] == 0
    assert all(not pair.delta().any() for pair in bundle.reconstruct("fresh").pairs.values())
    assert bundle.reconstruct("fresh").pairs.keys() == adapters["user0"].pairs.keys()


def test_duplicates_get_the_same_core(fleet):
    adapters = fleet((3, 3))
    adapters["twin"] = adapters["user0"]
    bundle = compress(adapters, CompressOptions(rank=4))
    module = bundle.modules["model.layers.0.q"]
    assert torch.equal(module.core(0), module.core(2))
    assert bundle.adapter_ids[0] == bundle.adapter_ids[2] != bundle.adapter_ids[1]


def test_report_says_what_was_asked_and_used(fleet):
    adapters = fleet((3, 3), shapes={"q": (20, 16), "k": (4, 16)})
    calls: list[tuple[int, int]] = []
    options = CompressOptions(rank=5, seed=9)
    bundle = compress(adapters, options, progress=lambda done, total: calls.append((done, total)))
    report = bundle.report
    assert calls == [(1, 2), (2, 2)]
    assert (report.k, report.seed, report.dtype, report.method) == (5, 9, "float16", "joint")
    assert report.k_used == {"k": 4, "q": 5} and report.seconds > 0
    for part in [*report.certificates.values(), report.overall]:
        assert part.lower_bound <= part.achieved <= part.upper_bound
    assert report.relative_error_max == max(report.relative_error.values())


def test_ids_are_those_given_or_made_from_the_content(fleet):
    adapters = fleet((3, 3))
    given = compress(adapters, EXACT, adapter_ids={"user1": "a-1", "user0": "a-0"})
    assert given.adapter_ids == ("a-0", "a-1")
    made = compress(adapters, EXACT)
    assert made.adapter_ids[0] == f"a-{adapters['user0'].content_hash()[:16]}"
    with pytest.raises(AdapterError, match="user0.*no id"):
        compress(adapters, EXACT, adapter_ids={"user1": "a-1"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_of_any_float_type(fleet, dtype):
    adapters = fleet((2, 2), dtype=dtype)
    bundle = compress(adapters, EXACT)
    wide = LoraAdapter(
        {name: LoraPair(pair.A.float(), pair.B.float()) for name, pair in adapters["user0"].pairs.items()}
    )
    assert error(wide, bundle.reconstruct("user0")) < 1e-6


def refused(adapters: dict[str, LoraAdapter], *words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        compress(adapters, EXACT)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_adapters_are_refused():
    refused({}, "no adapters")


def test_adapters_of_two_base_models_are_refused(fleet):
    adapters = fleet((2, 2))
    pairs = adapters["user1"].pairs
    adapters["user1"] = LoraAdapter(pairs, "tiny", "b" * 63 + "c")
    refused(adapters, "user0", "user1", "bbbb")
    adapters["user1"] = LoraAdapter(pairs, "tiny", "")
    refused(adapters, "user0", "user1", "unknown")
    adapters = {user: LoraAdapter(pairs, name) for user, name in (("user0", "gpt2"), ("user1", "llama"))}
    refused(adapters, "'gpt2'", "'llama'")
    adapters = {user: LoraAdapter(pairs, fan_in_fan_out=fan) for user, fan in (("x", True), ("y", False))}
    refused(adapters, "fan_in_fan_out", "x", "y")


def test_modules_of_two_shapes_are_refused(fleet):
    adapters = fleet((2,), shapes={"q": (8, 6)}) | {"wide": fleet((2,), shapes={"q": (8, 7)})["user0"]}
    refused(adapters, "q", "user0", "wide", "(8, 6)", "(8, 7)")


def test_malformed_adapters_are_refused(fleet):
    adapters = fleet((2, 2), shapes={"q": (8, 6)})
    pair = adapters["user1"].pairs["q"]
    for bad, word in (
        (LoraPair(pair.A, pair.B * float("nan")), "NaN"),
        (LoraPair(pair.A[:1], pair.B), "rank"),
        (LoraPair(pair.A[:0], pair.B[:, :0]), "rank 0"),
    ):
        refused(adapters | {"user1": LoraAdapter({"q": bad}, "tiny", "b" * 64)}, "user1", "q", word)
    refused(adapters | {"user1": LoraAdapter({}, "tiny", "b" * 64)}, "user1")


def test_a_bundle_is_a_value_that_survives_its_bytes(fleet):
    bundle = compress(fleet((3, 1, 2)), CompressOptions(rank=4))
    again = Bundle.from_bytes(bundle.to_bytes())
    for name, module in bundle.modules.items():
        for part, tensor in module.tensors().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, again.modules[name].tensors()[part])
