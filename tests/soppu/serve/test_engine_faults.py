"""What an engine refuses, and what fails in it: alone, while the others go on and their rows are freed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.sampling import Sampling
from tests.soppu.serve import tiny


def test_limits_are_refused_with_both_numbers(make: Callable[..., Engine]) -> None:
    engine = make(tiny.llama(), max_input_tokens=20, max_total_tokens=30)
    for request, words in (
        (GenerationRequest("a" * 200, max_new_tokens=1), "must be <= 30. Given: 200"),
        (GenerationRequest("a" * 25), "less than 20 tokens. Given: 25"),
        (GenerationRequest("a", max_new_tokens=30), "1 `inputs` tokens and 30"),
        (GenerationRequest("a", truncate=21), "less than 20. Given: 21"),
    ):
        with pytest.raises(RequestError, match="Input validation error") as caught:
            engine.submit(request)
        assert caught.value.status == 422 and words in str(caught.value)
    assert len(engine.submit(GenerationRequest("a" * 5)).result()[0]) <= 25
    assert engine.max_total_tokens == 30
    assert make(tiny.llama(), max_total_tokens=9999).max_total_tokens == 128


def test_a_full_queue_is_429_and_a_cancelled_request_frees_its_row(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    gate, inside = threading.Event(), threading.Event()
    model.lm_head.register_forward_hook(lambda *_: (inside.set(), gate.wait(30), None)[-1])
    engine = make(model, max_batch=1, max_queue=2)
    running = engine.submit(GenerationRequest("a", max_new_tokens=100))
    assert inside.wait(30)
    waiting = [engine.submit(GenerationRequest("a", max_new_tokens=2)) for _ in range(2)]
    with pytest.raises(RequestError, match="Model is overloaded") as caught:
        engine.submit(GenerationRequest("a"))
    assert (caught.value.status, caught.value.error_type) == (429, "overloaded")
    running.cancel()
    waiting[0].cancel()
    instead = engine.submit(GenerationRequest("a", max_new_tokens=2))
    gate.set()
    assert len(waiting[1].result()[0]) == len(instead.result()[0]) == 2
    assert len(running.ids) <= 2


def test_cancelled_requests_take_no_rows_of_the_next_batch(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    gate, inside, sizes = threading.Event(), threading.Event(), []
    model.lm_head.register_forward_hook(
        lambda _, args, __: (sizes.append(len(args[0])), inside.set(), gate.wait(30), None)[-1]
    )
    engine = make(model, max_batch=2, gather_seconds=0.0)
    first = engine.submit(GenerationRequest("a", max_new_tokens=1))
    assert inside.wait(30)
    engine.submit(GenerationRequest("a", max_new_tokens=1)).cancel()
    kept = [engine.submit(GenerationRequest("a", max_new_tokens=1)) for _ in range(2)]
    gate.set()
    assert all(generation.result() for generation in (first, *kept))
    assert sizes == [1, 2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(do_sample=True, temperature=1e-40, seed=1),
        Sampling(do_sample=True, repetition_penalty=1e-44, seed=1),
    ],
)
def test_parameters_that_allow_no_token_fail_their_own_request_only(
    sampling: Sampling, make: Callable[..., Engine]
) -> None:
    engine = make(tiny.llama(), gather_seconds=0.2)
    bad = engine.submit(GenerationRequest("a", max_new_tokens=3, sampling=sampling))
    good = engine.submit(GenerationRequest("a", max_new_tokens=3))
    with pytest.raises(RequestError, match="no token can be chosen with these parameters") as caught:
        bad.result()
    assert caught.value.status == 424
    assert good.result()[1].text == tiny.peft_text(tiny.llama(), "a", None, tokens=3)


def test_an_engine_is_unhealthy_from_three_failed_batches_until_one_succeeds(
    make: Callable[..., Engine],
) -> None:
    model = tiny.llama()
    engine = make(model)
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    for healthy in (True, True, False):
        with pytest.raises(RequestError, match="boom"):
            engine.submit(GenerationRequest("a", max_new_tokens=3)).result()
        assert engine.healthy is healthy
    handle.remove()
    engine.submit(GenerationRequest("a", max_new_tokens=3)).result()
    engine.submit(GenerationRequest("a", max_new_tokens=3)).result()  # the first batch is over by now
    assert engine.alive and engine.healthy


def test_a_broken_adapter_fails_alone_and_a_broken_batch_does_not_end_the_engine(
    make: Callable[..., Engine],
) -> None:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    adapter = tiny.lora(model, seed=1)
    bank.add("bad", adapter)
    loaded = bank.resolve("bad").where
    assert loaded is not None
    for pair in loaded.pairs.values():  # type: ignore[union-attr]
        pair.B.fill_(math.inf)
    engine = make(model, bank=bank, gather_seconds=0.2)
    drawn = Sampling(do_sample=True, seed=1)
    bad = [
        engine.submit(GenerationRequest("a", "bad", max_new_tokens=3, sampling=sampling))
        for sampling in (Sampling(), drawn)
    ]
    good = engine.submit(GenerationRequest("a", max_new_tokens=3))
    for generation in bad:
        with pytest.raises(RequestError, match="adapter 'bad' are not finite") as caught:
            generation.result()
        assert caught.value.status == 424
    assert good.result()[1].text == tiny.peft_text(tiny.llama(), "a", None, tokens=3)
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    with pytest.raises(RequestError, match="Server error: ValueError: boom"):
        engine.submit(GenerationRequest("a", max_new_tokens=3)).result()
    handle.remove()
    assert engine.alive and len(engine.submit(GenerationRequest("a", max_new_tokens=3)).result()[0]) == 3


def test_a_listener_that_raises_loses_only_its_own_request(make: Callable[..., Engine]) -> None:
    engine = make(tiny.llama(), gather_seconds=0.2)

    def broken(event: object) -> None:
        raise RuntimeError("gone")

    lost = engine.submit(GenerationRequest("a", max_new_tokens=50), sink=broken)
    kept = engine.submit(GenerationRequest("a", max_new_tokens=5))
    assert len(kept.result()[0]) == 5
    assert lost.done and len(lost.ids) == 2
