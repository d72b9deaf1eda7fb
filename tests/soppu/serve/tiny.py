"""Tiny models, a tokenizer and adapters for the serving tests; and PEFT's own answer to compare with."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import uvicorn
from peft import PeftModel
from starlette.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.options import CompressOptions
from soppu.federation.emulator import SUPPORTED
from soppu.models import linear_shapes
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.port import claim_port

BASE_HASH = "b" * 64
TOKEN = "the-admin-token"
_TEXT = [
    "def main():\n    return 0\n",
    "the quick brown fox jumps over the lazy dog",
    "žluťoučký kůň 日本語 🦊🦊",
]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens: its tokens often end inside a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


_SIZES: Mapping[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_OWN_SIZES: Mapping[str, Mapping[str, float]] = {
    "llama": {"num_key_value_heads": 2, "initializer_range": 0.3},
    "mistral": {"num_key_value_heads": 2, "initializer_range": 0.3},
    "qwen2": {"num_key_value_heads": 2, "initializer_range": 0.3},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3},
    "gpt_neox": {"initializer_range": 0.3},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "gpt2": {"initializer_range": 0.3},
}


def model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers, of one of the supported families."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **{name: size for name, size in _SIZES.items() if family != "opt" or name != "intermediate_size"},
        **_OWN_SIZES[family],
        vocab_size=len(tokenizer()),
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def llama(*, seed: int = 0) -> PreTrainedModel:
    return model("llama", seed=seed)


def base(folder: Path) -> Path:
    """`llama()` and its tokenizer, written down as a base model."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def gpt2(*, seed: int = 0) -> PreTrainedModel:
    return model("gpt2", seed=seed)


def lora(model: PreTrainedModel, *, seed: int, rank: int = 3, base_hash: str = BASE_HASH) -> LoraAdapter:
    """A random adapter on the family's default targets in every layer, large enough to change the text."""
    generator = torch.Generator().manual_seed(seed)
    leaves = SUPPORTED[model.config.model_type][1]
    pairs = {
        name: LoraPair(
            0.5 * torch.randn(rank, i, generator=generator), 0.5 * torch.randn(o, rank, generator=generator)
        )
        for name, (o, i) in linear_shapes(model).items()
        if name.rsplit(".", 1)[-1] in leaves
    }
    fan_in_fan_out = isinstance(model, GPT2LMHeadModel)
    return LoraAdapter(pairs, base_model="tiny", base_hash=base_hash, fan_in_fan_out=fan_in_fan_out)


def bundle(members: Mapping[str, LoraAdapter], *, rank: int = 32) -> Bundle:
    """A bundle that holds the adapters (almost) exactly, as cores in one shared basis a module."""
    exact = CompressOptions(method="joint", rank=rank, basis_bits=32, core_bits=32, device="cpu")
    return compress(members, exact)


def merged(model: PreTrainedModel, adapter: LoraAdapter | None) -> PreTrainedModel:
    """A copy of the model with the adapter added to its weights."""
    model = copy.deepcopy(model)
    for name, pair in adapter.pairs.items() if adapter else ():
        layer, delta = model.get_submodule(name), pair.delta().float()
        layer.weight += delta.T if isinstance(layer, Conv1D) else delta
    return model


def peft_text(
    model: PreTrainedModel, prompt: str, adapter: LoraAdapter | None, *, tokens: int, **options: object
) -> str:
    """What `generate` of transformers gives for one prompt, with the adapter through PEFT."""
    model = copy.deepcopy(model)
    if adapter is not None:
        with tempfile.TemporaryDirectory() as folder:
            adapters.write(adapter, Path(folder))
            model = PeftModel.from_pretrained(model, folder)
    ids = tokenizer()(prompt, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=tokens, **options)
    return str(tokenizer().decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@contextlib.contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """Run an ASGI application on a real port in a thread; yields its URL."""
    with claim_port("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served(
    model: PreTrainedModel,
    folder: Path,
    *,
    token: str = TOKEN,
    bundle: tuple[Path, str] | None = None,
    **options: int,
) -> Iterator[str]:
    """A server of `model` on a real port, with no adapters but those of a bundle file; yields its URL."""
    torch.set_num_threads(1)
    bank = AdapterBank(model, base_hash=BASE_HASH)
    state = ServerState.open(folder, bank)
    if bundle is not None:
        state.add_bundle(bundle[0], bundle_id=bundle[1])
        state.activate(bundle[1])
    engine = Engine(model, tokenizer(), bank, EngineOptions(**options))
    app = create_app(engine, info=ServerInfo("tiny", BASE_HASH, admin_token=token), state=state)
    try:
        with listening(app) as url:
            yield url
    finally:
        state.close()
