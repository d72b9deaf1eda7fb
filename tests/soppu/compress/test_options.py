from __future__ import annotations

import pytest

from soppu import compress
from soppu.compress import CompressOptions
from soppu.compress.options import METHODS
from soppu.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("rank", 0),
        ("rank", True),
        ("rank", 2.0),
        ("max_steps", -1),
        ("tolerance", -1e-9),
        ("tolerance", 1.0),
        ("tolerance", float("nan")),
        ("tolerance", "0.1"),
        ("seed", -1),
        ("dtype", "int8"),
        ("dtype", ["float16"]),
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
    with pytest.raises(ConfigError, match=r"rank.*dtype"):
        CompressOptions(rank=-1, dtype="float8")


def test_a_cuda_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="cuda:99"):
        CompressOptions(device="cuda:99").torch_device()


def test_auto_finds_a_device_and_every_method_has_code():
    assert CompressOptions().torch_device().type in ("cpu", "cuda")
    assert tuple(compress._METHODS) == METHODS
    assert compress.__all__ == sorted(compress.__all__)
