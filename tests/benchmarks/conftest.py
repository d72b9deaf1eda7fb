"""What a study of a tiny model begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import personal, personal_ground, personal_users
from benchmarks.personal_ground import Base, Ground
from tests.benchmarks.tiny_study import SIZES, people
from tests.soppu.serve import tiny


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    monkeypatch.setattr(personal_ground, "_SHARED_EVERY", 2)
    monkeypatch.setattr(personal_ground, "_SHARED_MOST", 4)
    monkeypatch.setattr(personal_ground, "FIRST", (1e-3, 3e-3))
    monkeypatch.setitem(personal_users.CORPORA, "stdlib", lambda least: people(10))  # type: ignore[misc]
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.pages.RESULTS", tmp_path)
    monkeypatch.setattr(personal, "FOLDER", tmp_path)
    config = tiny.llama().config
    config.num_hidden_layers = 4
    model = type(tiny.llama())(config).eval().requires_grad_(False)
    base = Base(model, tiny.tokenizer(), hash=tiny.BASE_HASH, layers=2)
    return Ground("stdlib", SIZES, base, folder=tmp_path, marks=(1, 2))
