"""A bundle's users as PEFT folders that LoRAX serves correctly.

LoRAX takes a folder it does not understand without an error and serves the base model instead, so the folders
keep to what its kernels and its loader know: one rank out of five for the whole fleet, to which every
module is padded here, not by LoRAX; scale 1; every projection on every decoder layer, with zeros where a user
has none; and two files that hold only what LoRAX reads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from soppu import files
from soppu.adapter import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError, ConfigError, StorageError
from soppu.module_names import split_layer

RANKS = (8, 16, 32, 64, 128)  # of LoRAX's decode kernels; any other fails at the first token, or is rescaled
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    folders: dict[str, Path]  # of every user
    rank: int  # the one rank of all of them
    modules: int  # how many each has
    layers: int  # decoder layers the modules were spread over; 0 where modules have no layer
    bytes: int  # of all weights files


def export(
    bundle: Bundle,
    out: Path,
    *,
    users: Sequence[str] = (),
    dtype: str = "float16",
    layers: int = 0,
    base_model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write `out`/USER for every user, all or nothing; a folder that is there already is left alone.

    A user's bytes are (o + i) R numbers for every module and layer, R the rank written. O(bytes).

    Args:
        users: whom to write; everybody, if nobody is named.
        dtype: "float16", "bfloat16" or "float32".
        layers: decoder layers of the base model; 0 takes the highest that the bundle names.
        base_model: `base_model_name_or_path` of the folders, to be the name the server was started with; None
            takes the bundle's.
        progress: called with (users done, users in all).

    Raises:
        BundleError: a user the bundle does not hold, or whose rank is above 128, name no folder can have, or
            numbers leave the dtype; a projection with two shapes, or a layer beyond `layers`.
        ConfigError: a dtype that is not one of the three.
        StorageError: `out` is there already, or the disk refused; nothing is left of the export then.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}, allowed: {', '.join(DTYPES)}")
    chosen = tuple(dict.fromkeys(users)) or bundle.users
    for user in chosen:
        bundle.index(user)
    if chosen and set(chosen) <= set(bundle.report.lost_users):
        raise BundleError(f"nothing of {', '.join(chosen[:5])} is in the bundle; compress with more bytes")
    rank = _rank(bundle, chosen)
    named = [parts[1] for name in bundle.shapes if (parts := split_layer(name))]
    layers = layers or 1 + max(named, default=-1)
    shapes = spread(bundle.shapes, layers=layers)
    config = _config(bundle, shapes, rank, base_model)
    written = 0
    with _folder(out) as work:
        for done, user in enumerate(chosen, start=1):
            tensors = _tensors(bundle.reconstruct(user), shapes, rank=rank, dtype=DTYPES[dtype], who=user)
            data = save(tensors)
            files.write_bytes(work / user / WEIGHTS_FILE, data)
            files.write_text(work / user / CONFIG_FILE, config)
            written += len(data)
            if progress is not None:
                progress(done, len(chosen))
    return Exported({user: out / user for user in chosen}, rank, len(shapes), layers, written)


def spread(shapes: Mapping[str, tuple[int, int]], *, layers: int) -> dict[str, tuple[int, int]]:
    """Every projection on each decoder layer: module -> (o, i), layer by layer, then what has no layer.

    Raises:
        BundleError: a projection with two shapes, or a layer that is not one of `layers`.
    """
    kinds: dict[tuple[str, str], str] = {}
    for name, shape in shapes.items():
        parts = split_layer(name)
        if parts is None:
            continue
        if parts[1] >= layers:
            raise BundleError(f"{name}: the base model was said to have {layers} layers, 0 to {layers - 1}")
        other = kinds.setdefault((parts[0], parts[2]), name)
        if shapes[other] != shape:
            raise BundleError(
                f"{name}: shape {shape}, {other} has {shapes[other]}; LoRAX takes one shape a kind"
            )
    made = {f"{a}{layer}{b}": shapes[name] for layer in range(layers) for (a, b), name in kinds.items()}
    return made | {name: shape for name, shape in shapes.items() if not split_layer(name)}


def _rank(bundle: Bundle, users: Sequence[str]) -> int:
    """The smallest of RANKS that holds every component of these users."""
    places = torch.tensor([bundle.index(user) for user in users])
    for user in users:
        if not files.is_name(user):
            raise BundleError(f"user {user!r}: cannot be the name of a folder")
    most = 0
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            counts = torch.bincount(part.user, minlength=len(bundle.users))[places]
            found = int(counts.max())
            if found > RANKS[-1]:
                who = users[int(counts.argmax())]
                raise BundleError(f"{who}: {name}: rank {found}, LoRAX serves ranks up to {RANKS[-1]}")
            most = max(most, found)
    return next(rank for rank in RANKS if rank >= most)


def _tensors(
    adapter: LoraAdapter, shapes: Mapping[str, tuple[int, int]], *, rank: int, dtype: torch.dtype, who: str
) -> dict[str, Tensor]:
    """Tensor name -> tensor, every factor padded with zeros to `rank`."""
    made: dict[str, Tensor] = {}
    for name, (o, i) in shapes.items():
        A, B = torch.zeros((rank, i), dtype=dtype), torch.zeros((o, rank), dtype=dtype)
        if name in adapter.pairs:
            pair = adapter.pairs[name]
            A[: pair.rank], B[:, : pair.rank] = pair.A.to(dtype), pair.B.to(dtype)
            if bool(pair.A.any() and pair.B.any()) and not bool(A.any() and B.any()):
                raise BundleError(f"{who}: {name}: numbers too small for {dtype} become 0; use float32")
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise BundleError(f"{who}: {name}: numbers beyond the range of {dtype}; bfloat16 has a wider one")
        made |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    return made


def _config(bundle: Bundle, shapes: Mapping[str, tuple[int, int]], rank: int, base_model: str | None) -> str:
    """What PEFT and LoRAX (which has PEFT 0.4.0) read; alpha is r, since the scale is in the tensors."""
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": bundle.base_model if base_model is None else base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bundle.fan_in_fan_out,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "inference_mode": True,
    }
    return json.dumps(values, indent=2)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block is through, and is gone if it is not."""
    if out.exists():
        raise StorageError(f"{out}: is there already; an export goes into a folder of its own")
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        yield work
        work.chmod(0o755)  # mkdtemp makes it 0700, which another user's server could not read
        files.sync(work)
        work.rename(out)
        files.sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out}: write failed, nothing was exported: {error}") from error
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work)
