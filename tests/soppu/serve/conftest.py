"""Engines of the tests, closed after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel

from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Builds and starts engines, and closes them afterwards."""
    engines: list[Engine] = []

    def build(model: PreTrainedModel, *, bank: AdapterBank | None = None, **options: float) -> Engine:
        bank = bank or AdapterBank(model, base_hash=tiny.BASE_HASH)
        engine = Engine(model, tiny.tokenizer(), bank, EngineOptions(**options))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()
