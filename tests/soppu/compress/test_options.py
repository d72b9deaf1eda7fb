from __future__ import annotations

from typing import get_args

import pytest

from soppu import compress
from soppu.compress import CompressOptions
from soppu.compress.options import DEFAULT_RATIO, Target
from soppu.config import METHODS, BasisBits, CoreBits
from soppu.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("rank", 0),
        ("rank", True),
        ("rank", 2.0),
        ("clusters", 0),
        ("clusters", "2"),
        ("basis_bits", 7),
        ("basis_bits", 1),
        ("core_bits", 5),
        ("core_bits", None),
        ("density", 0.0),
        ("density", 1.1),
        ("density", float("nan")),
        ("alpha", 0),
        ("alpha", float("inf")),
        ("faithful", 1),
        ("max_steps", -1),
        ("tolerance", -1e-9),
        ("tolerance", 1.0),
        ("tolerance", float("nan")),
        ("tolerance", "0.1"),
        ("shrink", 0.0),
        ("shrink", 1.5),
        ("seed", -1),
        ("ratio", -2),
        ("max_bytes", float("nan")),
        ("max_error", 1.0),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("device", None),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ConfigError) as caught:
        CompressOptions(**{name: value})
    assert f"compress.{name} = {value!r}" in str(caught.value) and "allowed" in str(caught.value)


def test_every_fault_is_listed():
    with pytest.raises(ConfigError, match=r"rank.*basis_bits.*device"):
        CompressOptions(rank=-1, basis_bits=9, device="gpu")


@pytest.mark.parametrize("bits", get_args(BasisBits))
def test_every_width_may_be_asked_for(bits):
    assert CompressOptions(method="joint", basis_bits=bits).basis_bits == bits
    assert CompressOptions(method="joint", core_bits=max(get_args(CoreBits))).core_bits == 32


@pytest.mark.parametrize("method", METHODS)
def test_only_clusters_have_clusters_and_only_some_methods_an_error(method):
    if method == "cluster":
        assert CompressOptions(method=method, clusters=3).clusters == 3
    else:
        with pytest.raises(ConfigError, match="only the method cluster"):
            CompressOptions(method=method, clusters=3)
    if method in ("ternary", "joint-diag"):
        with pytest.raises(ConfigError, match="no such target"):
            CompressOptions(method=method, max_error=0.1)
    else:
        assert CompressOptions(method=method, max_error=0.1).target == Target(max_error=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_need_a_target_have_one(method):
    needs = method in ("residual", "svd")
    assert CompressOptions(method=method).target == (Target(ratio=DEFAULT_RATIO) if needs else Target())
    assert CompressOptions(method=method, max_bytes=9).target == Target(max_bytes=9)


def test_a_cuda_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="cuda:99"):
        CompressOptions(device="cuda:99").torch_device()


def test_auto_finds_a_device_and_every_method_has_code(fleet):
    assert CompressOptions().torch_device().type in ("cpu", "cuda")
    assert compress.__all__ == sorted(compress.__all__)
    adapters = fleet((2, 2), shapes={"q": (48, 40)})
    for method in METHODS:
        ratio = 0.0 if method.startswith("joint") or method in ("cluster", "ternary") else 0.1
        made = compress.compress(adapters, CompressOptions(method=method, rank=2, ratio=ratio, device="cpu"))
        assert made.report.method == method
