"""Real vLLM processes that refuse to start: our sentence is the last line, and no traceback is there."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.options import CompressOptions
from soppu.federation.simulation import free_port
from soppu.models import BaseModel
from tests.soppu.serve import tiny
from tests.soppu.serve.vllm_plugin import live

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A model of two layers with heads as wide as vLLM's CPU kernels need."""
    live.require()
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        vocab_size=len(tiny.tokenizer()),
        bos_token_id=None,
        eos_token_id=tiny.tokenizer().eos_token_id,
        pad_token_id=tiny.tokenizer().pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return models.resolve(str(folder), cache=folder)


def bundle(base: BaseModel, *, leaf: str = "q_proj", out: int = 128) -> Bundle:
    g = torch.Generator().manual_seed(0)

    def pair() -> LoraPair:
        return LoraPair(torch.randn(4, 128, generator=g), torch.randn(out, 4, generator=g))

    names = [f"model.layers.{layer}.self_attn.{leaf}" for layer in range(2)]
    members = {
        user: LoraAdapter({name: pair() for name in names}, base.name, base.hash) for user in ("ann", "bob")
    }
    return compress(members, CompressOptions(method="joint", rank=8, device="cpu"))


def start(base: BaseModel, first: Bundle, folder: Path, *options: str, **environment: str) -> list[str]:
    """The lines of a server that has to refuse."""
    path = folder / "first.soppu"
    first.save(path)
    port = str(free_port())
    command = [live.PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base.path, "--port", port]
    given = {"VLLM_NO_USAGE_STATS": "1", "SOPPU_BUNDLE": str(path), "PYTHONPATH": str(live.ROOT)}
    given["SOPPU_STATE"] = str(folder / "state")
    done = subprocess.run(
        [*map(str, command), "--enforce-eager", "--max-model-len", "128", "--dtype", "float32", *options],
        env={**os.environ, **live.ENVIRONMENT, **given, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    assert not [line for line in lines if "Traceback" in line or "root cause" in line]
    return lines


@pytest.mark.parametrize("place", ["bundle", "option", "variable"])
def test_what_the_api_server_can_see_is_refused_before_an_engine_starts(
    base: BaseModel, tmp_path: Path, place: str
) -> None:
    first = bundle(base)
    if place == "bundle":
        lines = start(base, replace(first, base_hash="c" * 64), tmp_path)
        said = (
            f"made for base model cccccccccccc ({base.name}), this server has {base.hash[:12]} ({base.name})"
        )
    elif place == "option":
        lines = start(base, first, tmp_path, "--served-model-name", "ann")
        said = "user 'ann' has the name the base model is served under; choose another"
    else:
        lines = start(base, first, tmp_path, SOPPU_KERNEL="fast")
        said = "Error: SOPPU_KERNEL='fast': allowed are "
    assert lines[-1].startswith("Error: ") and said in lines[-1]
    assert not [line for line in lines if "EngineCore pid" in line]


@pytest.mark.parametrize("place", ["module", "shape"])
def test_what_only_a_worker_can_see_is_the_last_line_too(base: BaseModel, tmp_path: Path, place: str) -> None:
    if place == "module":
        lines = start(base, bundle(base, leaf="no_proj"), tmp_path)
        said = "model.layers.0.self_attn.no_proj: the engine has no such linear layer"
    else:
        lines = start(base, bundle(base, out=64), tmp_path)
        said = "model.layers.0.self_attn.q_proj: shape (64, 128), the base model has (128, 128)"
    assert lines[-1].startswith("Error: bundle ") and said in lines[-1]
    assert [line for line in lines if "Worker pid" in line]
