"""A bank over a folder of adapters, what is put into the folder, and in which words the bank refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank, Mount
from tests.soppu.serve import tiny

ALICE = "adapters/alice/0f3c9a"
BUNDLE_ID = "a" * 64
PROMPT = "the quick"


def make_bank(root: Path) -> AdapterBank:
    return AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, base_model="org/Tiny", mount=Mount(root))


def put(root: Path, path: str = ALICE, *, seed: int = 1, adapter: LoraAdapter | None = None) -> LoraAdapter:
    adapter = adapter or tiny.lora(tiny.llama(), seed=seed)
    adapters.write(adapter, root / path)
    return adapter


def refusal(bank: AdapterBank, adapter_id: str, *, status: int = 424) -> str:
    with pytest.raises(RequestError) as caught:
        bank.resolve(adapter_id)
    kind = "generation" if status == 424 else "validation"
    assert (caught.value.status, caught.value.error_type) == (status, kind)
    assert bank.residents() == {}
    return str(caught.value)
