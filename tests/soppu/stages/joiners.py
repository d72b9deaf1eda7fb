"""A fleet of three that is served in this process, and the text of who joins it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from soppu import models
from soppu.compress import Bundle
from soppu.serve import admin_token as tokens
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.stages import federate
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.publish import publish
from soppu.stages.run import Run
from tests.soppu.serve import tiny
from tests.soppu.stages.conftest import train, write_result

LENIENT = {"gate.max_loss_over_shared": 10.0, "gate.min_mean_gain_over_shared": -10.0}
QUICK: dict[str, object] = {
    "federation.personal_learning_rates": [0.05],
    "federation.personal_shares": [],
    "federation.personal_steps": 10,
}


@pytest.fixture
def overrides(tmp_path: Path, tiny_base: Path) -> Iterator[dict[str, object]]:
    """A server of the tiny model in this process, which the run's target is."""
    state, base = tmp_path / "serve", models.resolve(str(tiny_base), cache=tmp_path)
    token = tokens.ensure(tokens.token_file(state))
    model = models.load_model(base)
    bank = AdapterBank(model, base_hash=base.hash)
    held = ServerState.open(state, bank)
    engine = Engine(model, models.load_tokenizer(base), bank, EngineOptions())
    app = create_app(engine, info=ServerInfo("tiny", base.hash, admin_token=token), state=held)
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(json.dumps({"text": f"everybody says {n}"}) for n in range(20)))
    with tiny.listening(app) as url:
        yield {"serve.url": url, "align.source": str(public), **QUICK, **LENIENT}
    held.close()


@pytest.fixture
def fleet(run: Run, trained: dict[str, str]) -> str:
    """A bundle of three users, published; its id."""
    return a_fleet(run, trained)


def a_fleet(run: Run, trained: dict[str, str]) -> str:
    write_result(run, trained, shared=train(run, "bob", steps=4))
    folder = str(run.folder)
    set_id = federate.collect(folder, federate.federate(folder))
    bundle_id = compress_set(folder, set_id)
    publish(folder, bundle_id, evaluate(folder, set_id, bundle_id))
    return bundle_id


def text_of(user: str, folder: Path) -> Path:
    """A file of one user's, which does not say whose it is."""
    lines = [{"prompt": f"say {n}: ", "completion": f"{user} sings {n} " * 3} for n in range(20)]
    path = folder / f"{user}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def bundle_of(run: Run, bundle_id: str) -> Bundle:
    return Bundle.load(run.registry().bundle_path(bundle_id), expected_hash=bundle_id)
