"""A bundle is read as it was written, and gives back the adapter of every user in it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from soppu import adapter
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.numbers.components import unit
from soppu.compress.options import ratio
from soppu.errors import BundleError
from tests.soppu.compress import handmade

TINY = {"q": (4, 3)}
ASKED = {
    "residual": CompressOptions(max_error=0.2),
    "svd": CompressOptions(method="svd", max_error=0.1),
    "joint": CompressOptions(method="joint", rank=6),
    "joint in floats": CompressOptions(method="joint", rank=4, basis_bits=16, core_bits=32),
    "joint-diag": CompressOptions(method="joint-diag", rank=4),
    "cluster": CompressOptions(method="cluster", rank=3, clusters=2),
    "ternary": CompressOptions(method="ternary", density=0.4),
}
every_method = pytest.mark.parametrize("options", ASKED.values(), ids=ASKED.keys())
every_plan = pytest.mark.parametrize("plan", handmade.PLANS.values(), ids=handmade.PLANS.keys())


@pytest.fixture(scope="module")
def bundle(fleet) -> Bundle:
    return compress(fleet((2, 1, 2)), CompressOptions(method="joint", rank=6))


@every_method
def test_save_and_load_are_the_identity(fleet, options, tmp_path: Path):
    adapters = fleet((2, 1, 2), shapes={"model.layers.0.q": (60, 50), "model.layers.1.down": (40, 70)})
    bundle = compress(adapters, options)
    path = tmp_path / "deep" / "x.safetensors"
    bundle_id = bundle.save(path)
    assert bundle_id == hashlib.sha256(path.read_bytes()).hexdigest()
    again = Bundle.load(path, expected_hash=bundle_id)
    assert again.to_bytes() == bundle.to_bytes() == path.read_bytes()
    assert len(bundle.to_bytes()) == path.stat().st_size
    assert bundle.report.parameters_before == sum(a.parameters() for a in adapters.values())
    assert ratio(bundle.report.parameters_before, path.stat().st_size) > 0
    for name in ("users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out", "shapes", "pages"):
        assert getattr(again, name) == getattr(bundle, name)
    for name in ("ranks", "cluster", "norm"):
        assert torch.equal(getattr(again, name), getattr(bundle, name))
    for user in bundle.users:
        for name, pair in bundle.reconstruct(user).pairs.items():
            other = again.reconstruct(user).pairs[name]
            assert torch.equal(pair.A, other.A) and torch.equal(pair.B, other.B)


@every_method
def test_the_report_survives_but_for_the_clock_and_the_rounding_of_errors(fleet, options):
    bundle = compress(fleet((2, 1, 2), shapes={"a": (60, 50), "b": (40, 70)}), options)
    again = Bundle.from_bytes(bundle.to_bytes()).report
    assert again.settings() == bundle.report.settings() and again.seconds == 0
    assert (again.k_used, again.steps) == (bundle.report.k_used, bundle.report.steps)
    assert again.relative_error == pytest.approx(bundle.report.relative_error, rel=1e-6)
    for name, errors in bundle.report.module_error.items():
        assert again.module_error[name] == pytest.approx(errors, rel=1e-3, abs=1e-6)
        assert again.certificates[name].total == pytest.approx(bundle.report.certificates[name].total)


def test_the_same_adapters_give_the_same_bytes(fleet):
    options = CompressOptions(method="joint", rank=6)
    first, second = compress(fleet((2, 1, 2)), options), compress(fleet((2, 1, 2)), options)
    assert first.to_bytes() == second.to_bytes()


@every_plan
def test_reconstruct_is_the_sum_of_the_stored_components(plan):
    bundle = handmade.make(plan)
    for index, user in enumerate(bundle.users):
        again = bundle.reconstruct(user)
        for name, part in bundle.of(user).items():
            o, i = bundle.shapes[name]
            u, v = bundle.matrices(name, int(bundle.cluster[index]))
            expected = torch.zeros(o, i)
            for j in range(len(part)):
                left, right = vector(part.left, j, u, o), vector(part.right, j, v, i)
                expected += bundle.norm[index] * part.gain[j] * torch.outer(left, right)
            torch.testing.assert_close(again.pairs[name].delta(), expected, rtol=1e-4, atol=1e-4)


def vector(side: Any, j: int, basis: Tensor | None, d: int) -> Tensor:
    """u_j = U a_j + beta_j p_j / ||p_j||, from the tensors of one side."""
    made = torch.zeros(d)
    if side.coords_width[j]:
        assert basis is not None
        made += basis @ side.coordinates(basis.shape[1])[j]
    if side.own_width[j]:
        own = side.own[int((side.own_width[:j] > 0).sum())]
        made += side.beta[j] * unit(own[None])[0]
    return made


def test_full_cores_reconstruct_at_rank_k(fleet):
    bundle = compress(fleet((3, 2)), CompressOptions(method="joint", rank=4))
    pair = bundle.reconstruct("user1").pairs["model.layers.0.q"]
    assert pair.rank == 4
    assert int(torch.linalg.matrix_rank(pair.delta(), rtol=1e-2)) == 2


def test_a_module_whose_components_were_all_left_out_is_zero():
    bundle = handmade.make(handmade.PLANS["pages"])
    pair = bundle.reconstruct("user1").pairs["q"]
    assert (pair.B.shape, pair.A.shape) == ((7, 1), (1, 5)) and not pair.delta().any()
    assert "q" not in bundle.reconstruct("user2").pairs


def test_users_of_any_page_are_found():
    bundle = handmade.make(handmade.PLANS["pages"])
    assert [(page.first, page.users) for page in bundle.pages] == [(0, 2), (2, 1)]
    sizes = {user: [len(part) for part in bundle.of(user).values()] for user in ("user2", "user0", "user1")}
    assert sizes == {"user0": [1, 1], "user1": [0, 0], "user2": [1]}


def test_users_are_reconstructed_in_the_bases_of_their_cluster():
    bundle = handmade.make(handmade.PLANS["two clusters"])
    assert bundle.cluster.tolist() == [0, 1, 0]
    (first, _), (second, _) = (bundle.matrices("q", cluster) for cluster in (0, 1))
    assert first is not None and second is not None and not torch.equal(first, second)
    delta = bundle.reconstruct("user0").pairs["q"].delta()
    torch.testing.assert_close(first @ torch.linalg.lstsq(first, delta).solution, delta, rtol=1e-3, atol=1e-3)
    outside = second @ torch.linalg.lstsq(second, delta).solution - delta
    assert float(outside.norm()) > 0.1 * float(delta.norm())


def test_a_reconstructed_adapter_is_written_and_read_as_a_peft_folder(bundle, tmp_path: Path):
    again = bundle.reconstruct("user1")
    adapter.write(again, tmp_path / "peft")
    assert adapter.read(tmp_path / "peft").content_hash() == again.content_hash()


def test_an_unknown_user_is_named(bundle):
    with pytest.raises(BundleError, match="unknown user 'nobody'; the bundle holds 3 users"):
        bundle.reconstruct("nobody")


def test_user_names_are_kept_as_they_are(fleet):
    names = ["zoë", "a/b", 'say "x"', "content", "用户", "page.0", " ", "\U0001f600", "a\nb\0"]
    made = fleet((1,) * len(names), shapes=TINY)
    bundle = compress(dict(zip(names, made.values(), strict=True)), CompressOptions(method="joint", rank=2))
    assert Bundle.from_bytes(bundle.to_bytes()).users == tuple(names)


def test_the_file_is_plain_safetensors(bundle):
    tensors = load(bundle.to_bytes())
    types = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    streams = ("meta", "bases", "ranks", "cluster", "page.0")
    assert types == dict.fromkeys(streams, (torch.uint8, 1)) | {
        "norm": (torch.float32, 1),
        "error": (torch.float32, 1),
        "module_error": (torch.float16, 2),
        "certificates": (torch.float32, 2),
    }
