"""Choosing a token: each parameter against its definition, written slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soppu.serve.engine.sampling import Sampler, Sampling, processors

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])


def scores(logits: Tensor, ids: Sequence[int] = (0,), *, prompt: int = 0, **sampling: Any) -> Tensor:
    return processors(Sampling(**sampling), prompt=prompt)(torch.tensor([ids]), logits[None])[0]


@given(
    generated=st.lists(st.integers(0, 5), max_size=12),
    prompt=st.lists(st.integers(0, 5), max_size=5),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_frequency_and_presence_count_what_was_generated_and_not_the_prompt(
    generated: list[int], prompt: list[int], frequency: float, presence: float
) -> None:
    found = scores(
        LOGITS,
        [*prompt, *generated] or [0],
        prompt=len(prompt) or int(not generated),
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    expected = [
        float(LOGITS[i]) - frequency * generated.count(i) - presence * (i in generated) for i in range(6)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_penalty_takes_part_in_a_greedy_choice() -> None:
    sampler = Sampler(Sampling(frequency_penalty=0.6), prompt=1)
    assert not sampler.is_plain and sampler.seed is None
    assert sampler.choose(LOGITS, [2]) == 2
    assert sampler.choose(LOGITS, [2, 2]) == 2
    assert sampler.choose(LOGITS, [2, 2, 2]) == 4
    assert Sampler(Sampling(presence_penalty=-2.0), prompt=0).choose(LOGITS, [4]) == 4
    assert Sampler(Sampling()).is_plain


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8, 0.99])
def test_typical_p_keeps_the_tokens_nearest_to_the_expected_information(mass: float) -> None:
    kept = scores(LOGITS, do_sample=True, typical_p=mass).isfinite()
    p = LOGITS.softmax(-1)
    entropy = -(p * p.log()).sum()
    expected: set[int] = set()
    for token in sorted(range(6), key=lambda i: abs(float(-p[i].log() - entropy))):
        expected.add(token)
        if float(p[list(expected)].sum()) >= mass:
            break
    assert {int(i) for i in kept.nonzero()} == expected


def test_the_order_is_loraxs_penalties_first_then_temperature_and_the_cuts() -> None:
    found = scores(
        LOGITS,
        [2, 2, 0],
        do_sample=True,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        temperature=0.5,
        top_k=2,
    )
    penalized = torch.tensor([0.25, -1.0, 1.0, 0.0, 1.0, -3.0]) - torch.tensor([0.25, 0, 0.25, 0, 0, 0])
    expected = torch.full((6,), -torch.inf)
    expected[[2, 4]] = penalized[[2, 4]] / 0.5
    torch.testing.assert_close(found, expected)


def test_warping_keeps_what_top_k_and_top_p_promise() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = scores(logits, do_sample=True, top_k=2).softmax(-1)
    torch.testing.assert_close(kept, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    kept = scores(logits, do_sample=True, top_p=0.65).softmax(-1)
    torch.testing.assert_close(kept, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    kept = scores(logits, do_sample=True, top_p=1e-6).softmax(-1)
    torch.testing.assert_close(kept, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(scores(logits, do_sample=True, temperature=0.5), 2 * logits)
    torch.testing.assert_close(
        scores(torch.tensor([2.0, -2.0, 1.0]), [0, 1, 1], repetition_penalty=2.0),
        torch.tensor([1.0, -4.0, 1.0]),
    )
    kept = scores(logits, do_sample=True, top_k=2**63, top_p=1.0)
    torch.testing.assert_close(kept, logits)  # more than there are keeps all


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    sampler = Sampler(Sampling(do_sample=True, seed=3))
    counts = (
        torch.bincount(torch.tensor([sampler.choose(logits, []) for _ in range(4000)]), minlength=3) / 4000
    )
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)
