"""Whose adapter is of a base model, as a freeze of everybody's current adapter tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.errors import RegistryError
from soppu.registry import Registry

MODEL = Base("org/Tiny", "b" * 64)
OF_IT = {
    "hashed": MODEL,
    "renamed": Base("else/where", MODEL.hash),
    "named": Base("org/Tiny"),
    "folder": Base("/models/tiny/"),
}
NOT_OF_IT = {"another": Base("org/Tiny", "c" * 64)}
UNKNOWN = {"mute": Base(), "vague": Base("/runs/7/final")}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    opened = Registry.open(tmp_path / "registry")
    for number, (user, base) in enumerate({**OF_IT, **NOT_OF_IT, **UNKNOWN}.items()):
        pair = LoraPair(torch.full((1, 4), float(number)), torch.ones(4, 1))
        opened.put_adapter(
            LoraAdapter({"model.layers.0.self_attn.q_proj": pair}, base.name, base.hash), user=user
        )
    return opened


def test_a_freeze_takes_who_has_no_base_hash_by_the_base_name(registry: Registry) -> None:
    assert registry.get_set(registry.freeze_current(MODEL)).keys() == OF_IT.keys()
    assert list(registry.current_set(base=MODEL)) == sorted(OF_IT)


def test_a_freeze_says_whom_it_leaves_out_for_want_of_a_hash(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.freeze_current(MODEL)
    (said,) = caplog.messages
    assert said.startswith("left out of the set: mute, vague: ") and "--base" in said


def test_who_is_chosen_is_not_left_out(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    chosen = {user: registry.current(user) for user in UNKNOWN}
    assert registry.get_set(registry.freeze_current(MODEL, chosen=chosen)).keys() == OF_IT.keys() | UNKNOWN
    assert caplog.messages == []


def test_a_freeze_reads_bases_from_the_catalogue_and_no_tensors(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "get_adapter", lambda *_: pytest.fail("tensors were read"))
    other = registry.get_set(registry.freeze_current(Base("any", "c" * 64)))
    assert other == {"another": registry.current("another")}
    with pytest.raises(RegistryError, match="at least one user"):
        registry.freeze_current(Base("any", "d" * 64))
