"""The ways that benchmarks/serve_kernels.py times compute what they stand for."""

from __future__ import annotations

import pytest
import torch

from benchmarks import serve_kernels
from benchmarks.serve_kernels import Setting
from soppu.serve.layers import records
from soppu.serve.layers.kernels import Basis

SETTING = Setting(shape=(48, 32), users=5, batch=9, rank=4, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(SETTING.batch, SETTING.shape[1])


@pytest.mark.parametrize("way", [serve_kernels.shared, serve_kernels.static])
@pytest.mark.parametrize("layer", [0, serve_kernels.LAYERS - 1])
def test_the_shared_basis(way: object, layer: int, x: torch.Tensor) -> None:
    rows, held = SETTING.rows(seed=1), serve_kernels.bases(SETTING)
    (V, U, cores), k = held, SETTING.rank
    y = torch.ones(SETTING.batch, SETTING.shape[0])
    way(SETTING, held, rows)(x, y, layer)  # type: ignore[operator]
    core = cores.view(len(cores), -1, k, k)[rows, layer]
    expected = 1 + torch.stack([x[n] @ V[layer] @ core[n] @ U[layer] for n in range(SETTING.batch)])
    torch.testing.assert_close(y, expected)


def test_own_components(x: torch.Tensor) -> None:
    rows, held = SETTING.rows(seed=1), serve_kernels.records(SETTING, 3 * 5 * 4 * (32 + 48) // 2)
    assert len(held.shapes) == 3
    part = records.unpack(held, 2, 1)
    assert part is not None
    D = (part.p * part.left[:, None]).mT @ (part.q * part.right[:, None])
    cores = torch.zeros(1, 0)
    made = [Basis.of([(None, None)], [(0, 48, n)], like=torch.zeros(32, 0), k=(0, 0)) for n in range(3)]
    recorded = serve_kernels.stepped(SETTING, made, cores, rows, held)
    for way in (serve_kernels.own(SETTING, held, rows), recorded):
        y = torch.ones(SETTING.batch, SETTING.shape[0])
        way(x, y, 1)
        torch.testing.assert_close(y, 1 + x @ D.mT)


@pytest.mark.parametrize("way", [serve_kernels.gathered, serve_kernels.segments])
def test_ordinary_lora(way: object, x: torch.Tensor) -> None:
    rows = SETTING.rows(seed=1)
    A, B = serve_kernels.tables(SETTING, 3 * 4 * 5 * 4 * (32 + 48))
    assert A.shape == (3, 5, 4, 32)
    y = torch.ones(SETTING.batch, SETTING.shape[0])
    way(A, B, rows)(x, y, 2)  # type: ignore[operator]
    expected = 1 + torch.stack([x[n] @ A[2, user].mT @ B[2, user] for n, user in enumerate(rows.tolist())])
    torch.testing.assert_close(y, expected)


def test_the_floor_counts_each_user_once() -> None:
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 4])
    told, (out, size), rank = serve_kernels.touched(SETTING, rows), SETTING.shape, SETTING.rank
    tokens = 9 * (size + 2 * out)
    assert told["own"] == 4 * tokens + 3 * rank * (size + out) // 2
    assert told["gathered"] == 4 * (tokens + 3 * rank * (size + out))
    assert told["shared"] == 4 * (tokens + rank * (size + out) + 3 * rank**2)
