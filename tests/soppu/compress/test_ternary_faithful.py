"""ComPEFT as released, against a slow plain reading of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.codec import golomb
from soppu.compress.numbers import ternary
from soppu.errors import ConfigError
from tests.soppu.compress import ternary_measures as measures
from tests.soppu.compress.ternary_adapters import dense, draw, flat, gaussian

PUBLISHED = {0.01: 0.0911, 0.02: 0.162, 0.05: 0.339, 0.1: 0.576, 0.2: 0.939, 0.3: 1.188, 0.5: 1.5}


def released(adapter: LoraAdapter, *, k: float, alpha: float) -> dict[str, np.ndarray]:
    """The released procedure, number by number."""
    keys = {}
    for name, pair in adapter.pairs.items():
        keys[f"{name}.lora_A.weight"], keys[f"{name}.lora_B.weight"] = pair.A.numpy(), pair.B.numpy()
    tau = [float(x) for key in sorted(keys) for x in keys[key].reshape(-1)]
    mean = math.fsum(tau) / len(tau)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in tau) / (len(tau) - 1))
    if k > 1:
        k /= 100
    threshold = sorted(abs(x) for x in tau)[len(tau) - int(len(tau) * k) - 1]
    new = iter([alpha * sigma * math.copysign(1, x) if abs(x) >= threshold and x else 0.0 for x in tau])
    return {
        key: np.array([next(new) for _ in range(keys[key].size)]).reshape(keys[key].shape)
        for key in sorted(keys)
    }


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 0.5, 0.9, 5, 20.0, 99])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 6.0])
def test_faithful_is_the_released_procedure(density: float, alpha: float) -> None:
    adapter = gaussian(b=0.5)
    wanted = released(adapter, k=density, alpha=alpha)
    made = ternary.faithful(adapter, density=density, alpha=alpha)
    for name, part in made.items():
        pair = part.pair()
        np.testing.assert_allclose(pair.A.numpy(), wanted[f"{name}.lora_A.weight"], rtol=1e-5)
        np.testing.assert_allclose(pair.B.numpy(), wanted[f"{name}.lora_B.weight"], rtol=1e-5)


def test_faithful_keeps_one_more_than_its_share_and_all_ties() -> None:
    adapter = LoraAdapter({"m": LoraPair(A=torch.arange(1.0, 11.0)[None], B=torch.full((10, 1), 7.0))})
    made = ternary.faithful(adapter, density=0.1, alpha=1.0)["m"]
    assert (int(made.A.sum()), int(made.B.sum())) == (3, 0)
    made = ternary.faithful(adapter, density=0.15, alpha=1.0)["m"]
    assert (int(made.A.sum()), int(made.B.sum())) == (4, 10)


def test_the_scale_is_of_all_numbers_and_unbiased() -> None:
    adapter = LoraAdapter({"m": LoraPair(A=torch.tensor([[3.0, 0.0]]), B=torch.tensor([[0.0], [1.0]]))})
    made = ternary.faithful(adapter, density=0.25, alpha=2.0)["m"]
    assert made.gain.item() == pytest.approx(4 * 2.0)  # 3, 0, 0, 1: squares 4, 1, 1, 0 over n - 1 = 3


def test_the_delta_goes_with_the_square_of_alpha() -> None:
    once, twice = (ternary.faithful(gaussian(), density=0.2, alpha=alpha) for alpha in (1.5, 3.0))
    for name, delta in dense(once).items():
        torch.testing.assert_close(dense(twice)[name], 4 * delta)


def test_a_lora_scale_in_b_is_taken_out_and_put_back() -> None:
    adapter = gaussian()
    folded = LoraAdapter({n: LoraPair(A=p.A, B=4 * p.B) for n, p in adapter.pairs.items()})
    plain = ternary.faithful(adapter, density=0.2, alpha=1.0)
    made = ternary.faithful(folded, density=0.2, alpha=1.0, lora_scale=4.0)
    for name, part in made.items():
        assert torch.equal(part.A, plain[name].A) and torch.equal(part.B, plain[name].B)
        torch.testing.assert_close(part.gain, 4 * plain[name].gain)


@pytest.mark.parametrize("density", [1, 1.0, 100, 100.5, 1000, -0.1, math.nan, math.inf])
def test_faithful_refuses_what_the_released_code_cannot_do(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        ternary.faithful(gaussian(), density=density, alpha=1.0)


@pytest.mark.parametrize("density", [0.9999, 99.99])
def test_faithful_refuses_to_drop_nothing(density: float) -> None:
    with pytest.raises(ConfigError, match="keeps all"):
        ternary.faithful(gaussian(rank=1), density=density, alpha=1.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_none(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        ternary.faithful(gaussian(), density=0.1, alpha=alpha)


@pytest.fixture(scope="module")
def wide() -> LoraAdapter:
    """Five million normal numbers."""
    return LoraAdapter({"m": LoraPair(A=draw(16, 160_000), B=draw(160_000, 16, seed=1))})


@pytest.mark.parametrize("density", PUBLISHED)
def test_published_bits_by_really_encoded_signs(wide: LoraAdapter, density: float) -> None:
    signs = flat(ternary.faithful(wide, density=density, alpha=1.0))
    bits = 8 * len(measures.rice(signs)) / signs.size
    assert bits == pytest.approx(PUBLISHED[density], abs=5e-4)
    assert 8 * len(golomb.encode(signs)) / signs.size < bits + 5e-4
