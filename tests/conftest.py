"""Tiny random models, a tokenizer and a saved base model, made in memory: no download, always the same."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from xdist.scheduler import LoadFileScheduling

# The same examples every time, however slow the machine. To look for new ones: --hypothesis-profile=default
settings.register_profile(
    "soppu", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("soppu")


# One worker's under `-n`, as every other file is by itself: what shares a stack, what fills the machine, and
# what parses the standard library, which takes ten seconds each time.
_TOGETHER = {
    "tests/soppu/data/test_data.py": "library",
    "tests/soppu/test_corpus.py": "library",
    "tests/soppu/commands/test_calibrate.py": "library",
    "tests/benchmarks/test_federation_study.py": "library",
    "tests/containers/": "docker",
    "tests/flows/": "stack",
    "tests/soppu/targets/test_vllm.py": "vllm",
    "tests/soppu/stages/test_publish_vllm.py": "vllm",
}


class _Scheduler(LoadFileScheduling):
    """Files, and the groups above. (Marks of xdist do nothing with this pytest: it keeps ids elsewhere.)"""

    def _split_scope(self, nodeid: str) -> str:
        path = super()._split_scope(nodeid)
        return next((group for start, group in _TOGETHER.items() if path.startswith(start)), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduler:
    return _Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What runs at import is traced in one worker alone: the others import the same, at twice the speed."""
    tracing = getattr(session.config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    if tracing is None or os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        return (yield)
    tracing.pause()
    try:
        return (yield)
    finally:
        tracing.resume()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with slow tests first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """What a test draws without a generator of its own does not depend on what its worker ran before."""
    random.seed(0)
    torch.manual_seed(0)


LAYERS = 8
HIDDEN = 32
VOCABULARY = 320  # 256 bytes, the special tokens, and a few merges
_LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_TEXT = ["def main():\n    return 0\n", "the quick brown fox jumps over the lazy dog", "return self.value"]

# Model type -> class, configuration class, and what its configuration calls the sizes.
_FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA_LIKE),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _LLAMA_LIKE),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "layerdrop": 0.0,
        },
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    ),
}


def build_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, frozen and in evaluation mode; weights large enough to matter."""
    model_class, config_class, sizes = _FAMILIES[family]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    spread = {"init_std": 0.15} if family == "opt" else {"initializer_range": 0.15}
    torch.manual_seed(seed)
    model = model_class(config_class(**{"vocab_size": VOCABULARY, **special, **spread, **sizes, **changes}))
    return model.eval().requires_grad_(False)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`python(script)`: what is run in the place of this Python, with the words of its command."""

    def become(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return become


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawn() -> dict[str, str]:
    """Figures drawn so far, by what they were drawn of."""
    return {}


@pytest.fixture(scope="module")
def drawn_once(drawn: dict[str, str]) -> Iterator[None]:
    """Pages of equal data share their figures: matplotlib takes half a second for each page's."""
    from soppu.evaluate import plots

    draw, known = plots.draw, drawn

    def remembered(figure: Any, **told: str) -> str:
        key = json.dumps([figure.func.__name__, figure.args, told], default=repr)
        if key not in known:
            known[key] = draw(figure, **told)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", remembered)
        yield


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("llama", seed=1)`: a model of one's own, for tests that change it."""
    return build_model


def _untouched(family: str) -> Iterator[PreTrainedModel]:
    """A model shared by many tests; it must leave the last of them as it came to the first."""
    model = build_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = model.config.num_hidden_layers
    yield model
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"a test has changed the shared {family} model: {changed}"
    assert model.config.num_hidden_layers == layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="session")
def tiny_llama() -> Iterator[PreTrainedModel]:
    yield from _untouched("llama")


@pytest.fixture(scope="session")
def tiny_qwen2() -> Iterator[PreTrainedModel]:
    yield from _untouched("qwen2")


@pytest.fixture(scope="session")
def tiny_neox() -> Iterator[PreTrainedModel]:
    yield from _untouched("gpt_neox")


@pytest.fixture(scope="session")
def tiny_opt() -> Iterator[PreTrainedModel]:
    yield from _untouched("opt")


@pytest.fixture(scope="session")
def tiny_gpt2() -> Iterator[PreTrainedModel]:
    yield from _untouched("gpt2")


@pytest.fixture(params=["llama", "qwen2", "neox", "opt", "gpt2"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the five families in turn."""
    model: PreTrainedModel = request.getfixturevalue(f"tiny_{request.param}")
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; id 0 is the end of a text, id 1 is padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A folder with the tiny llama and its tokenizer, for `soppu.models.resolve`. Copy it to change it."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flower_identity() -> Iterator[None]:
    """Who this process is to Flower, for as long as tests need it."""
    from tests.server.grid import identify  # takes seconds to import: only where it is asked for

    with pytest.MonkeyPatch.context() as patch:
        identify(patch.setattr)
        yield


@pytest.fixture
def fresh_workbench() -> Iterator[None]:
    """What a process keeps between messages is neither an earlier test's nor left to a later one."""
    from clients.workbench import workbench  # as above

    workbench.cache_clear()
    yield
    workbench.cache_clear()


def _write_users(folder: Path, counts: Mapping[str, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for user, count in counts.items():
        lines = [
            {
                "user_id": user,
                "prompt": f"{user} asks what the {user}-secret number {n} is:\n",
                "completion": f"it is {n * n + 7}, says {user}-whisper-{n}\n",
            }
            for n in range(count)
        ]
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / f"{user}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="session")
def write_users() -> Callable[[Path, Mapping[str, int]], Path]:
    """`write_users(folder, {"alice": 12})`: one JSONL file a user, every text with the user's name in it."""
    return _write_users
