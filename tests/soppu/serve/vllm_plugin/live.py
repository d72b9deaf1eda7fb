"""A real vLLM server with the plugin, for tests: on the embedded base model, in its own environment."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.options import CompressOptions
from soppu.federation.simulation import free_port
from soppu.targets.vllm import VllmLaunch, VllmTarget
from tests.soppu.serve import handmade

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PROMPT = "def read_file(path):\n    "
TOKENS = 16
USERS = ("ann", "bob", "cem", "dora", "žofie")
OPTIONS = ("--max-model-len", "1024", "--max-num-seqs", "32")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "SOPPU_MAX_ERROR": "0.1", "HF_HUB_OFFLINE": "1"}
# What starts a server on model runner V2, whose kernels Triton interprets on a CPU.
INTERPRETED = Path(__file__).parent / "interpreted"
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": f"{INTERPRETED}:{ROOT}"}
_RANK = 8


def require() -> None:
    """Skip, saying why, where there is no environment with vLLM."""
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed here; `make vllm` makes .venv-vllm")


@functools.cache
def base() -> models.BaseModel:
    return models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")


@functools.cache
def adapter(name: str, *, clusters: int = 1, inside: bool = True, strength: float = 2.0) -> LoraAdapter:
    """A random adapter on q and v of every layer, strong enough to change the text.

    Args:
        clusters: subspaces that users are spread over; a user is inside one of them unless `inside` is False.
    """
    g = torch.Generator().manual_seed(sum(name.encode()))
    subspace = sum(name.encode()) % clusters
    pairs = {}
    for layer in range(30):
        for leaf, o in (("q_proj", 576), ("v_proj", 192)):
            module = f"model.layers.{layer}.self_attn.{leaf}"
            common = torch.Generator().manual_seed(1000 * layer + o + 100_000 * subspace)
            source = common if inside else g
            U = torch.linalg.qr(torch.randn(o, _RANK, generator=source))[0]
            V = torch.linalg.qr(torch.randn(576, _RANK, generator=source))[0]
            core = strength * torch.randn(_RANK, _RANK, generator=g) / _RANK**0.5
            pairs[module] = LoraPair(A=V.mT.contiguous(), B=(U @ core).contiguous())
    return LoraAdapter(pairs, base_model="smollm2-135m", base_hash=base().hash)


@functools.cache
def bundle(users: tuple[str, ...] = USERS, *, clusters: int = 1, strength: float = 2.0) -> Bundle:
    method = "cluster" if clusters > 1 else "joint"
    options = CompressOptions(method=method, clusters=clusters, rank=_RANK, device="cpu")
    members = {user: adapter(user, clusters=clusters, strength=strength) for user in users}
    return compress(members, options)


@functools.cache
def residual(users: tuple[str, ...], *, ratio: float = 8.0) -> Bundle:
    """Users who have little in common, by the default method: most of it is their own numbers."""
    members = {user: adapter(user, inside=False) for user in users}
    made = compress(members, CompressOptions(ratio=ratio, device="cpu"))
    assert made.report.method == "residual"
    return made


@functools.cache
def mixed() -> Bundle:
    """One user with cores alone, one with own numbers alone, one with both."""
    shapes = {name: (len(pair.B), pair.A.shape[1]) for name, pair in adapter("ann").pairs.items()}
    own, core = ("own", "both", "left"), ("axis", "axis", "axis", "axis")
    plans = {"core": [core], "own": [own], "both": [("right", "shared", "own"), core]}
    made = handmade.bundle(shapes, plans, sizes=handmade.Sizes(k_out=4, k_in=5))
    return replace(made, norm=made.norm / 3, base_hash=base().hash, base_model="smollm2-135m")


@dataclass
class Texts:
    """What transformers says, with an adapter merged into the weights; the model is loaded once."""

    known: dict[str, str] = field(default_factory=dict)

    def of(self, adapter: LoraAdapter | None) -> str:
        key = adapter.content_hash() if adapter else ""
        if key not in self.known:
            self.known[key] = _greedy(adapter)
        return self.known[key]


@functools.cache
def _loaded() -> tuple[object, object]:
    model = AutoModelForCausalLM.from_pretrained(base().path, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(base().path, local_files_only=True)


def _greedy(adapter: LoraAdapter | None) -> str:
    model, tokenizer = _loaded()
    pairs = adapter.pairs if adapter else {}
    kept = {}
    with torch.no_grad():
        for name, pair in pairs.items():
            weight = model.get_submodule(name).weight  # type: ignore[attr-defined]
            kept[name] = weight.clone()
            weight += pair.B @ pair.A
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids  # type: ignore[operator]
        made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)  # type: ignore[attr-defined]
        for name, weight in kept.items():
            model.get_submodule(name).weight.copy_(weight)  # type: ignore[attr-defined]
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))  # type: ignore[attr-defined]


def launch(folder: Path, first: Bundle, *, dtype: str = "float32") -> VllmLaunch:
    first.save(folder / "first.soppu")
    return VllmLaunch(
        python=PYTHON,
        model=base().path,
        bundle=folder / "first.soppu",
        log=folder / "vllm.log",
        pid_file=folder / "vllm.pid",
        dtype=dtype,
        options=OPTIONS,
        environment=ENVIRONMENT,
    )


def target() -> VllmTarget:
    return VllmTarget(
        f"http://127.0.0.1:{free_port()}", base_hash=base().hash, admin_token="secret", timeout=300
    )
