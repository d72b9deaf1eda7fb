"""Stopping: what was taken is finished within the grace, what comes is refused, what is left is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from tests.soppu.serve import tiny


@dataclass
class Gated:
    """An engine whose forwards wait until `gate` is open."""

    engine: Engine
    gate: threading.Event = field(default_factory=threading.Event)
    inside: threading.Event = field(default_factory=threading.Event)

    def closing(self, grace: float) -> threading.Thread:
        """A thread that closes the engine, once nothing new is taken."""
        thread = threading.Thread(target=self.engine.close, kwargs={"grace": grace})
        thread.start()
        while not self.engine.draining:
            time.sleep(0.001)
        return thread


@pytest.fixture
def gated() -> Iterator[Gated]:
    torch.set_num_threads(1)
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    gated = Gated(Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=1)))
    model.lm_head.register_forward_hook(lambda *_: (gated.inside.set(), gated.gate.wait(30), None)[-1])
    with gated.engine:
        yield gated
        gated.gate.set()


def test_closing_fails_what_is_not_finished_and_refuses_what_comes() -> None:
    model = tiny.llama()
    inside = threading.Event()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    engine = Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=1))

    def wait_for_the_end(*_: object) -> None:
        inside.set()
        while engine.alive:
            time.sleep(0.01)

    model.lm_head.register_forward_hook(wait_for_the_end)
    with engine:
        running = [engine.submit(GenerationRequest("a", max_new_tokens=100)) for _ in range(2)]
        assert inside.wait(30)
    for generation in running:
        with pytest.raises(RequestError, match="Incomplete generation"):
            generation.result()
    with pytest.raises(RequestError, match="this server is stopping") as caught:
        engine.submit(GenerationRequest("a"))
    assert (caught.value.status, caught.value.error_type) == (503, "overloaded")
    assert not engine.alive


def test_what_was_taken_is_finished_within_the_grace_and_nothing_new_is_taken(gated: Gated) -> None:
    running = [gated.engine.submit(GenerationRequest("a", max_new_tokens=4)) for _ in range(3)]
    assert gated.inside.wait(30)
    thread = gated.closing(60)
    with pytest.raises(RequestError, match="stopping") as caught:
        gated.engine.submit(GenerationRequest("a"))
    assert (caught.value.status, caught.value.error_type) == (503, "overloaded")
    assert gated.engine.alive and not gated.engine.healthy
    gated.gate.set()
    assert all(len(generation.result()[0]) == 4 for generation in running)
    thread.join(30)
    assert not thread.is_alive() and not gated.engine.alive


def test_a_second_close_without_grace_ends_the_first(gated: Gated) -> None:
    running = gated.engine.submit(GenerationRequest("a", max_new_tokens=100))
    assert gated.inside.wait(30)
    threads = [gated.closing(600), gated.closing(600), gated.closing(0)]
    gated.gate.set()
    with pytest.raises(RequestError, match="Incomplete generation") as caught:
        running.result()
    assert (caught.value.status, caught.value.error_type) == (500, "incomplete_generation")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gated.engine.close(grace=600)  # closed already: returns at once
    assert not gated.engine.alive


def test_an_idle_engine_and_one_that_never_started_close_without_waiting(gated: Gated) -> None:
    gated.gate.set()
    gated.engine.submit(GenerationRequest("a", max_new_tokens=2)).result()
    waiting = gated.engine.submit(GenerationRequest("a", max_new_tokens=100))
    waiting.cancel()
    for engine in (gated.engine, Engine(tiny.llama(), tiny.tokenizer(), gated.engine.bank)):
        thread = threading.Thread(target=engine.close, kwargs={"grace": 600})
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and not engine.alive


def test_a_request_taken_by_an_engine_that_never_started_is_told_of_its_end() -> None:
    model = tiny.llama()
    engine = Engine(model, tiny.tokenizer(), AdapterBank(model, base_hash=tiny.BASE_HASH))
    waiting = engine.submit(GenerationRequest("a"))
    engine.close(grace=600)
    with pytest.raises(RequestError, match="Incomplete generation"):
        waiting.result()
