"""The compiled kernel at every size of tile and panel, against float64 one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soppu.serve.vllm_plugin.worker import kernels
from soppu.serve.vllm_plugin.worker.resident import Basis

USERS = 5
# Columns of two parts: every width of panel, and a rest that fills none.
SIZES = (16 * (16 + 8 + 4 + 2 + 1) + 3, 48)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if why := kernels.load():
        pytest.skip(f"no compiled kernel: {why}")


def _basis(k: int, size: int) -> tuple[Basis, Tensor]:
    """A basis of two parts with a gap between them, and the table of cores."""
    spans = torch.tensor([[2, SIZES[0]], [SIZES[0] + 7, SIZES[1]]])
    basis = Basis(torch.randn(size, 2 * k), torch.randn(k * sum(SIZES)), k=k, offset=5, spans=spans)
    return basis, torch.randn(USERS, 5 + 2 * k * k)


def _expected(x: Tensor, y: Tensor, basis: Basis, tokens: kernels.Tokens) -> Tensor:
    y, k = y.double(), basis.k
    for number, row in enumerate(tokens.rows.tolist()):
        place = number if tokens.places is None else int(tokens.places[number])
        cores = tokens.cores[row, 5:].double().view(2, k, k)
        inner = (x[place].double() @ basis.V.double()).view(2, k)
        for part, (at, U) in enumerate(basis.outputs()):
            y[place, at : at + U.shape[1]] += inner[part] @ cores[part] @ U.double()
    return y


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("k", [3, 16, 40])
def test_every_number_of_tokens(k: int, picked: bool) -> None:
    torch.manual_seed(k)
    basis, cores = _basis(k, size=37)
    for count in range(1, 20):
        places = torch.randperm(25)[:count].sort().values if picked else None
        tokens = kernels.Tokens(cores, torch.randint(0, USERS, (count,)), places)
        x, y = torch.randn(25, 37), torch.randn(25, SIZES[0] + 7 + SIZES[1] + 1)
        wanted = _expected(x, y, basis, tokens)
        kernels.native(x, y, basis, tokens)
        assert float((y - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_token_gets_the_same_bits_in_any_company() -> None:
    torch.manual_seed(0)
    basis, cores = _basis(40, size=64)
    rows = torch.randint(0, USERS, (13,))
    x, y = torch.randn(13, 64), torch.randn(13, SIZES[0] + 7 + SIZES[1])
    alone = y.clone()
    kernels.native(x, y, basis, kernels.Tokens(cores, rows, None))
    for number in range(13):
        one = slice(number, number + 1)
        kernels.native(x[one], alone[one], basis, kernels.Tokens(cores, rows[one], None))
    assert torch.equal(y, alone)
