"""LoraAdapter: one user's low-rank change of a base model, and its PEFT folder on disk.

Module names are always those of the full model (`model.layers.26.self_attn.q_proj`); the numbering of an
emulator never leaves `emulator`. The LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) is folded
into B when a folder is read, here and nowhere else: inside SOPPU the delta is B @ A.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from soppu import base_identity, files
from soppu.base_identity import Base
from soppu.errors import AdapterError
from soppu.module_names import split_layer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "soppu.json"
# PEFT features whose effect is more than B @ A on the base weights as they are.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
)
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The factors of one module's change D = B @ A: A (r, i), B (o, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return int(self.A.shape[0])

    def delta(self) -> Tensor:
        """The dense change (o, i). O(o r i): for tests and merging, never on the way to a bundle."""
        return self.B @ self.A


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A set of LoRA pairs for one base model.

    Attributes:
        pairs: full-model module name -> LoraPair, scale already folded into B.
        base_model: hub id or folder, as written to `base_model_name_or_path`.
        base_hash: hash of the base model's files (`soppu.models.BaseModel.hash`), "" if unknown.
        fan_in_fan_out: True where the base stores weights as (i, o), as GPT-2's Conv1D does.
    """

    pairs: Mapping[str, LoraPair]
    base_model: str = ""
    base_hash: str = ""
    fan_in_fan_out: bool = False
    _hash: str = field(default="", init=False, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the adapter knows it."""
        return Base(self.base_model, self.base_hash)

    def content_hash(self) -> str:
        """SHA-256 over base hash, weight layout and every tensor (name, dtype, shape, bytes), by name."""
        if not self._hash:
            digest = hashlib.sha256(f"soppu-lora-1\n{self.base_hash}\n{self.fan_in_fan_out}\n".encode())
            for name in sorted(self.pairs):
                for side in ("A", "B"):
                    tensor = getattr(self.pairs[name], side).detach().cpu().contiguous()
                    digest.update(f"{name}.{side} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                    # flat first: a single row or column may keep any stride and still be contiguous
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            object.__setattr__(self, "_hash", digest.hexdigest())
        return self._hash

    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(pair.A.numel() + pair.B.numel() for pair in self.pairs.values())

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Module name -> (o, r, i)."""
        return {
            name: (int(pair.B.shape[0]), pair.rank, int(pair.A.shape[1])) for name, pair in self.pairs.items()
        }


def validate(adapter: LoraAdapter, *, who: str) -> None:
    """Refuse an adapter that must not go further.

    Args:
        who: the user or folder named in the message.

    Raises:
        AdapterError: no tensors, shapes that do not fit together, NaN or Inf.
    """
    if not adapter.pairs:
        raise AdapterError(f"{who}: the adapter holds no LoRA tensors")
    for name, pair in adapter.pairs.items():
        if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
            raise AdapterError(
                f"{who}: {name}: A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} do not share a rank"
            )
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{who}: {name}: lora_{side} holds NaN or Inf")


def check_shapes(adapter: LoraAdapter, expected: Mapping[str, tuple[int, int]], *, who: str) -> None:
    """Check every module against `expected` (module -> (o, i)); AdapterError names the first that differs."""
    for name, (o, _, i) in adapter.shapes().items():
        if name not in expected:
            raise AdapterError(f"{who}: {name}: the base model has no such module")
        if (o, i) != expected[name]:
            raise AdapterError(f"{who}: {name}: shape {(o, i)}, the base model has {expected[name]}")


def stamped(adapter: LoraAdapter, base: Base, *, who: str) -> LoraAdapter:
    """The adapter with the name and hash of `base`, whatever name it had. AdapterError for another hash."""
    base_identity.check(Base(base.name, adapter.base_hash or base.hash), base, who=who, whose="--base is")
    return replace(adapter, base_model=base.name, base_hash=base.hash)


def write(adapter: LoraAdapter, folder: Path) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` loads; lora_alpha == r, so its scale is 1.

    The identity file comes last: a folder without one was interrupted. Raises StorageError.
    """
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": getattr(pair, side).detach().cpu().contiguous().clone()
        for name, pair in adapter.pairs.items()
        for side in ("A", "B")
    }
    files.write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    files.write_text(folder / CONFIG_FILE, json.dumps(_peft_config(adapter), indent=2, sort_keys=True))
    identity = {"format": 1, "base_hash": adapter.base_hash, "content": adapter.content_hash()}
    files.write_text(folder / IDENTITY_FILE, json.dumps(identity, indent=2))


def read(folder: Path) -> LoraAdapter:
    """Read a PEFT LoRA folder, ours or anybody's.

    Raises:
        AdapterError: a file is missing or damaged, a tensor has no partner, or the folder uses a PEFT
            feature that is not a plain LoRA (DoRA, bias, modules_to_save, PiSSA, trained embeddings).
    """
    config = _read_json(folder / CONFIG_FILE)
    _refuse_features(config, folder)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(folder / WEIGHTS_FILE).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{folder}: tensor {key!r} is not a lora_A or lora_B weight")
        halves.setdefault(match["module"], {})[match["side"]] = tensor
    pairs = {}
    for name, half in halves.items():
        if missing := {"A", "B"} - half.keys():
            raise AdapterError(f"{folder}: {name}: lora_{missing.pop()} is missing")
        scale = _scale(config, name, half["A"], who=str(folder))
        pair = LoraPair(half["A"], half["B"])
        # folded in float32: a bf16 product of B and the scale would lose digits
        pairs[name] = pair if scale == 1.0 else LoraPair(pair.A.float(), pair.B.float() * scale)
    adapter = LoraAdapter(
        pairs,
        base_model=config.get("base_model_name_or_path") or "",
        base_hash=_identity(folder).get("base_hash", ""),
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
    )
    validate(adapter, who=str(folder))
    noted = _identity(folder).get("content", "")
    if noted and noted != adapter.content_hash():
        raise AdapterError(
            f"{folder}: {IDENTITY_FILE} belongs to other tensors ({noted[:12]}, found"
            f" {adapter.content_hash()[:12]}); delete it if another program has written the folder again"
        )
    return adapter


def _identity(folder: Path) -> dict[str, Any]:
    path = folder / IDENTITY_FILE
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file") from None
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: truncated or not safetensors: {error}") from None


def _refuse_features(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{folder}: peft_type {config['peft_type']!r}, only LORA is supported")
    faults = [name for name in _NOT_PLAIN if config.get(name)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in _INITS:
        faults.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if faults:
        raise AdapterError(f"{folder}: not a plain LoRA adapter: {', '.join(faults)}")


def _scale(config: Mapping[str, Any], module: str, A: Tensor, *, who: str) -> float:
    if A.ndim != 2 or A.shape[0] < 1:
        raise AdapterError(f"{who}: {module}: lora_A has shape {tuple(A.shape)}, expected (r, i) with r >= 1")
    rank = int(A.shape[0])
    try:
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterError(f"{who}: {CONFIG_FILE}: lora_alpha or alpha_pattern: {error}") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _peft_config(adapter: LoraAdapter) -> dict[str, Any]:
    from peft import LoraConfig  # noqa: PLC0415 - only where an adapter is written: servers that read bundles need no PEFT

    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    rank = max(ranks.values())
    other = {name: value for name, value in ranks.items() if value != rank}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in ranks})
    layers = sorted({parts[1] for name in ranks if (parts := split_layer(name))})
    regular = len(ranks) == len(leaves) * len(layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        target_modules=leaves if regular else sorted(ranks),
        layers_to_transform=layers if regular else None,
        base_model_name_or_path=adapter.base_model,
        fan_in_fan_out=adapter.fan_in_fan_out,
        inference_mode=True,
        task_type="CAUSAL_LM",
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
