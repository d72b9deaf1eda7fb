"""The packed product is the plain one, and the choice of a number format is a measured one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from soppu.models import DTYPES
from soppu.serve.layers.packed_linear import PackedLinear, can_pack, fastest_dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_layers_of_one_input_give_their_outputs_side_by_side(
    dtype: str, rows: int, biases: tuple[bool, ...]
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(40, o, bias=bias).to(DTYPES[dtype]) for o, bias in zip((48, 24), biases, strict=True)]
    x, residual = torch.randn(rows, 40), torch.randn(rows, 72)
    packed = PackedLinear.of(layers)
    kind = DTYPES[dtype]
    with torch.no_grad():
        expected = torch.cat(
            [F.linear(x, *[p.float() for p in layer.parameters()]) for layer in layers], dim=1
        )
        error = 1e-5 if dtype == "float32" else 0.05
        torch.testing.assert_close(packed(x.to(kind)).float(), expected, atol=error, rtol=error)
        found = packed.plus(x.to(kind), residual.to(kind)).float()
        torch.testing.assert_close(found, expected + residual, atol=error, rtol=error)


def test_a_residual_is_not_changed() -> None:
    packed, residual = PackedLinear(torch.ones(8, 4)), torch.zeros(2, 8)
    assert packed.plus(torch.ones(2, 4), residual).eq(4).all() and not residual.any()


def test_what_cannot_be_packed_is_a_plain_product() -> None:
    assert not can_pack(torch.ones(4, 4, dtype=torch.float64))
    weight = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(PackedLinear(weight)(torch.eye(4, dtype=torch.float64)), weight.T)


def test_the_number_format_is_chosen_by_time_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = fastest_dtype("cpu")
    assert chosen in ("float32", "bfloat16")
    assert f"dtype auto: {chosen}" in caplog.text and "float32 " in caplog.text and "bfloat16 " in caplog.text
