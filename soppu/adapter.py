"""LoraAdapter: one user's low-rank change of a base model, and its PEFT folder on disk.

Module names are always those of the full model (`model.layers.26.self_attn.q_proj`); the numbering of an
emulator never leaves `federation.emulator`. The LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) is
folded into B when a folder is read, here and nowhere else: inside SOPPU the delta is B @ A.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from soppu import base_identity, files, peft_config
from soppu.base_identity import Base
from soppu.errors import AdapterError
from soppu.module_names import split_layer
from soppu.peft_config import LoraFields

Place = TypeVar("Place")
Read = TypeVar("Read")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SHARED_FILE = "shared.safetensors"  # beside it, where folders share factors: one file, linked into each
IDENTITY_FILE = "soppu.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_AS_THEY_ARE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE_MODEL = "{beside} is of a whole model: give the adapter's own folder, saved before merge_and_unload"
_CURES = (  # a pattern of what may lie in the folder instead, and what to do with it
    (
        "adapter_model*.bin",
        'the weights are in {beside}; in {folder} run: python -c "import glob, torch;'
        " from safetensors.torch import save_file; save_file({{k: v.clone() for p in"
        " glob.glob('adapter_model*.bin') for k, v in torch.load(p, 'cpu', weights_only=True).items()}},"
        " 'adapter_model.safetensors')\"",
    ),
    (
        "adapter_model-*.safetensors",
        'the weights are in parts ({beside}); in {folder} run: python -c "import glob;'
        " from safetensors.torch import load_file, save_file; save_file({{k: v for p in"
        " glob.glob('adapter_model-*.safetensors') for k, v in load_file(p).items()}},"
        " 'adapter_model.safetensors')\"",
    ),
    (
        WEIGHTS_FILE,
        "its weights are there, but only that file says their scale: copy it from where they were trained",
    ),
    ("*/" + CONFIG_FILE, "there is an adapter in {inside}: give that folder"),
    ("model*.safetensors", _WHOLE_MODEL),
    ("pytorch_model*.bin", _WHOLE_MODEL),
)


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

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> LoraPair:
        """The factors elsewhere, or in another dtype; the same tensors where that is so already."""
        return LoraPair(self.A.to(device, dtype, copy=copy), self.B.to(device, dtype, copy=copy))

    def change(self, x: Tensor) -> Tensor:
        """B A x of inputs (..., i), in their dtype: a float32 copy would be the largest thing kept."""
        return torch.nn.functional.linear(
            torch.nn.functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)
        )


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A set of LoRA pairs for one base model."""

    pairs: Mapping[str, LoraPair]  # by full-model module name, scale already folded into B
    base_model: str = ""  # hub id or folder, as written to `base_model_name_or_path`
    base_hash: str = ""  # hash of the base model's files (`soppu.models.BaseModel.hash`), "" if unknown
    fan_in_fan_out: bool = False  # the base stores weights as (i, o), as GPT-2's Conv1D does
    _hash: str = field(default="", init=False, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the adapter knows it."""
        return Base(self.base_model, self.base_hash)

    def content_hash(self) -> str:
        """SHA-256 over base hash, weight layout and every tensor (name, dtype, shape, bytes), by name."""
        if not self._hash:
            head = f"soppu-lora-1\n{self.base_hash}\n{self.fan_in_fan_out}\n"
            pairs = ((name, self.pairs[name]) for name in sorted(self.pairs))
            named = ((f"{name}.{side}", getattr(pair, side)) for name, pair in pairs for side in ("A", "B"))
            object.__setattr__(self, "_hash", hash_of(head, named))
        return self._hash

    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(pair.A.numel() + pair.B.numel() for pair in self.pairs.values())

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Module name -> (o, r, i)."""
        return {
            name: (int(pair.B.shape[0]), pair.rank, int(pair.A.shape[1])) for name, pair in self.pairs.items()
        }


class AdaptersOnDemand(Mapping[str, Read], Generic[Place, Read]):
    """User -> adapter or core, in the order of `places`: what a compression of many users takes.

    Nothing is kept: memory is what the caller holds at a time, and every pass reads again.
    """

    def __init__(self, places: Mapping[str, Place], read: Callable[[Place], Read]) -> None:
        """Take down where adapters are; `read` gives the one at a place, and raises what it raises."""
        self._places = dict(places)
        self._read = read

    def __getitem__(self, user: str) -> Read:
        """Read the user's adapter, each time. KeyError for somebody else."""
        return self._read(self._places[user])

    def __contains__(self, user: object) -> bool:
        return user in self._places  # the mixin's would read the adapter

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def hash_of(head: str, named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, over `head` and tensors in the order given: name, dtype, shape, bytes. O(numbers)."""
    digest = hashlib.sha256(head.encode())
    for name, tensor in named:
        here = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {here.dtype} {tuple(here.shape)}\n".encode())
        # flat first: a single row or column may keep any stride and still be contiguous
        digest.update(here.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def validate(adapter: LoraAdapter, *, who: str) -> None:
    """Refuse an adapter that must not go further.

    Args:
        who: the user or folder named in the message.

    Raises:
        AdapterError: no tensors, shapes that do not fit together, NaN or Inf.
    """
    if not adapter.pairs:
        raise AdapterError(f"{who}: the adapter holds no LoRA tensors: nothing was trained, or nothing saved")
    for name, pair in adapter.pairs.items():
        if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
            raise AdapterError(
                f"{who}: {name}: A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} do not share a rank;"
                " save the adapter again"
            )
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{who}: {name}: lora_{side} holds NaN or Inf; take an earlier checkpoint")


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
    """Read a PEFT LoRA folder, ours or anybody's; 8-bit floats are widened to float32, which is exact.

    Tensors of `SHARED_FILE`, where there is one, count as if they were in `WEIGHTS_FILE`.

    Raises:
        AdapterError: a file is missing or damaged, a tensor has no partner or lies in both files, its rank is
            not the one that the configuration gives it, or the folder uses a PEFT feature that is not a plain
            LoRA.
    """
    config = peft_config.parse(_read_json(folder / CONFIG_FILE), who=str(folder / CONFIG_FILE))
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_weights(folder).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{folder}: tensor {key!r} is not a lora_A or lora_B weight; allowed are names such as"
                " base_model.model.<module>.lora_A.weight: train linear layers only, and save with PEFT"
            )
        halves.setdefault(match["module"], {})[match["side"]] = tensor
    identity = _read_json(folder / IDENTITY_FILE) if (folder / IDENTITY_FILE).exists() else {}
    adapter = LoraAdapter(
        {name: _pair(config, name, half, who=str(folder)) for name, half in halves.items()},
        base_model=config.base_model_name_or_path or "",
        base_hash=identity.get("base_hash", ""),
        fan_in_fan_out=bool(config.fan_in_fan_out),
    )
    validate(adapter, who=str(folder))
    noted = identity.get("content", "")
    if noted and noted != adapter.content_hash():
        raise AdapterError(
            f"{folder}: {IDENTITY_FILE} belongs to other tensors ({noted[:12]}, found"
            f" {adapter.content_hash()[:12]}); delete it if another program has written the folder again"
        )
    return adapter


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return files.read_object(path, error=AdapterError, cure="write it again with PEFT's save_pretrained")
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path) from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    own, path = _read_tensors(folder / WEIGHTS_FILE), folder / SHARED_FILE
    shared = _read_tensors(path) if path.exists() or path.is_symlink() else {}
    if twice := sorted(own.keys() & shared.keys()):
        raise AdapterError(
            f"{folder}: tensor {twice[0]!r} is in {WEIGHTS_FILE} and in {SHARED_FILE}, and only one can be"
            " meant: write the folder again"
        )
    return own | shared


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}
    except FileNotFoundError:
        raise _absent(path) from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: truncated or not safetensors: {error}; copy or save the folder again"
        ) from None


def _absent(path: Path) -> AdapterError:
    """The error for a file that is not there: what lies beside it, and what to do with that."""
    folder = path.parent
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        cure = f"{folder} {what}; give the folder that PEFT's save_pretrained has written"
        return AdapterError(f"{path}: no such file; {cure}")
    for pattern, cure in _CURES:
        if beside := sorted(folder.glob(pattern)):
            text = cure.format(beside=beside[-1].name, inside=beside[-1].parent, folder=folder)
            return AdapterError(f"{path}: no such file; {text}")
    names = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
    return AdapterError(
        f"{path}: no such file; the folder holds {names}; needed are {CONFIG_FILE} and {WEIGHTS_FILE},"
        " as PEFT's save_pretrained writes them"
    )


def _pair(config: LoraFields, module: str, half: Mapping[str, Tensor], *, who: str) -> LoraPair:
    """The factors of one module, scale folded into B; AdapterError where file and configuration disagree."""
    if missing := {"A", "B"} - half.keys():
        raise AdapterError(
            f"{who}: {module}: lora_{missing.pop()} is missing; save the adapter again,"
            " from one process with all parameters gathered"
        )
    if not config.targets(module):
        raise AdapterError(
            f"{who}: {module}: the file has tensors of it, but target_modules, exclude_modules or"
            f" layers_to_transform in {CONFIG_FILE} leave it out, and PEFT would ignore them: name it there,"
            " or remove the tensors"
        )
    A, B = (_as_float(half[side], f"{who}: {module}: lora_{side}") for side in ("A", "B"))
    if A.ndim != 2 or A.shape[0] < 1:
        raise AdapterError(
            f"{who}: {module}: lora_A has shape {tuple(A.shape)}, expected (r, i) with r >= 1; save the"
            " adapter again with all parameters gathered"
        )
    rank, scale = int(A.shape[0]), config.scale(module)
    if B.shape[1:] == (rank,) and rank != config.rank(module):
        raise AdapterError(
            f"{who}: {module}: the tensors have rank {rank}, {CONFIG_FILE} says {config.rank(module)} (r or"
            " rank_pattern), so their scale is uncertain, and PEFT loads them neither. If alpha and rank of"
            f" the file were meant, as in PEFT's weighted merges: set rank_pattern[{module!r}] to {rank} and"
            f" alpha_pattern[{module!r}] to {scale * config.divisor(rank):g}, and so for every such module"
        )
    # folded in float32 at least: a bf16 product of B and the scale would lose digits
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    if scale != 1.0:
        return LoraPair(A.to(wide), B.to(wide) * scale)
    return LoraPair(A, B) if A.dtype == B.dtype else LoraPair(A.to(wide), B.to(wide))


def _as_float(tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype in _AS_THEY_ARE:
        return tensor
    if str(tensor.dtype).startswith("torch.float8"):
        return tensor.float()
    raise AdapterError(
        f"{what} holds {str(tensor.dtype).removeprefix('torch.')}, expected float16, bfloat16, float32,"
        " float64 or an 8-bit float: convert the adapter to one of them and save it again"
    )


def _peft_config(adapter: LoraAdapter) -> dict[str, Any]:
    from peft import LoraConfig  # noqa: PLC0415 - only where an adapter is written: servers that read bundles need no PEFT

    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    rank = max(ranks.values())
    other = {name: value for name, value in ranks.items() if value != rank}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in ranks})
    layers = sorted({parts[1] for name in ranks if (parts := split_layer(name))})
    # PEFT finds a layer's number only where what holds the layers has a name before it: "model.layers.0."
    places = {
        (parts[1], name.rsplit(".", 1)[-1])
        for name in ranks
        if (parts := split_layer(name)) and parts[0].count(".") > 1
    }
    regular = len(places) == len(ranks) == len(leaves) * len(layers)
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
