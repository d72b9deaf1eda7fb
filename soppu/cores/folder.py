"""A core on disk: core.safetensors with its numbers, core.json with what they mean and their hash."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from soppu import files
from soppu.adapter import LoraPair
from soppu.cores.core import CoreAdapter
from soppu.errors import AdapterError

WEIGHTS_FILE, CONFIG_FILE = "core.safetensors", "core.json"
FORMAT = 1
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>core|own_A|own_B)")
_FIELDS = {"basis_id": str, "base_model": str, "base_hash": str, "fan_in_fan_out": bool, "content": str}
_CURE = "write the folder again"


def write(core: CoreAdapter, folder: Path) -> None:
    """Write both files, each atomically; core.json comes last, so a folder without one was interrupted.

    Raises StorageError.
    """
    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in core.tensors().items()}
    files.write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    told = {name: getattr(core, name) for name in _FIELDS if name != "content"}
    told |= {"format": FORMAT, "id": core.id, "content": core.content_hash()}
    files.write_text(folder / CONFIG_FILE, json.dumps(told, indent=2, sort_keys=True))


def read(folder: Path) -> CoreAdapter:
    """Read a core. Whether it fits a basis, and is finite, is asked where it meets one (`CoreInBasis`).

    Raises:
        AdapterError: a file is missing or damaged, of a newer format, or the two do not belong together.
    """
    path = folder / CONFIG_FILE
    try:
        told = files.read_object(path, error=AdapterError, cure=_CURE)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(
            f"{path}: no such file; a core is a folder of {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    if told.get("format") != FORMAT:
        raise AdapterError(f"{path}: format {told.get('format')!r}, this version reads {FORMAT}")
    for name, kind in _FIELDS.items():
        if type(told.get(name)) is not kind:
            raise AdapterError(f"{path}: {name} = {told.get(name)!r}, expected a {kind.__name__}; {_CURE}")
    noted = told.pop("content")
    parts = _parts(folder / WEIGHTS_FILE)
    own = {name: _own(name, parts, folder) for name, part in parts if part != "core"}
    core = CoreAdapter(
        cores={name: tensor for (name, part), tensor in parts.items() if part == "core"},
        own=own,
        **{name: told[name] for name in _FIELDS if name != "content"},
    )
    if core.content_hash() != noted:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} belongs to other numbers ({noted[:12]}, found"
            f" {core.content_hash()[:12]}); {_CURE}"
        )
    return core


def _own(name: str, parts: dict[tuple[str, str], Tensor], folder: Path) -> LoraPair:
    if missing := {"own_A", "own_B"} - {part for module, part in parts if module == name}:
        raise AdapterError(f"{folder}: {name}.{missing.pop()} is missing; {_CURE}")
    return LoraPair(parts[name, "own_A"], parts[name, "own_B"])


def _parts(path: Path) -> dict[tuple[str, str], Tensor]:
    """(module, part) -> tensor."""
    try:
        with safe_open(path, framework="pt") as stream:
            found = {key: stream.get_tensor(key) for key in stream.keys()}
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; {_CURE}") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: truncated or not safetensors: {error}; {_CURE}") from None
    parts = {}
    for key, tensor in found.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{path}: tensor {key!r}, allowed: <module>.core, .own_A and .own_B; {_CURE}")
        parts[match["module"], match["part"]] = tensor
    return parts
