"""A basis on disk: one safetensors file with U and V of every module, and what they are of in its header."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from soppu import files
from soppu.cores.basis import CoreBasis, validate
from soppu.errors import AdapterError

FORMAT = 1
_HEAD = "soppu-basis"  # the one entry of the header: safetensors keeps no order among several
_KEY = re.compile(r"(?P<module>.+)\.(?P<side>[UV])")
_FIELDS = {"base_model": str, "base_hash": str, "fan_in_fan_out": bool, "content": str}
_COMMON = "common"  # told where it is not 0
_CURE = "write the file again"


def encode(basis: CoreBasis) -> bytes:
    """The bytes of the file. Equal bases of one base model give equal bytes."""
    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in basis.tensors().items()}
    told = {name: getattr(basis, name) for name in _FIELDS if name != "content"}
    told |= {"format": FORMAT, "id": basis.id, "content": basis.content_hash()}
    told |= {_COMMON: basis.common} if basis.common else {}
    return save(tensors, metadata={_HEAD: json.dumps(told, sort_keys=True)})


def write(basis: CoreBasis, path: Path) -> None:
    """Write the file atomically. Raises StorageError."""
    files.write_bytes(path, encode(basis))


def read(path: Path) -> CoreBasis:
    """Read a basis, and check it against the content that its header names. O(size).

    Raises:
        AdapterError: the file is missing, damaged, of another format, or holds another basis than it says.
    """
    tensors, told = _read(path)
    if told.get("format") != FORMAT:
        raise AdapterError(f"{path}: format {told.get('format')!r}, this version reads {FORMAT}")
    for name, kind in _FIELDS.items():
        if type(told.get(name)) is not kind:
            raise AdapterError(f"{path}: {name} = {told.get(name)!r}, expected a {kind.__name__}; {_CURE}")
    noted, common = told["content"], told.get(_COMMON, 0)
    if type(common) is not int:
        raise AdapterError(f"{path}: {_COMMON} = {common!r}, expected a whole number; {_CURE}")
    named = {name: told[name] for name in _FIELDS if name != "content"}
    basis = CoreBasis(_sides(tensors, path), **named, common=common)
    validate(basis, who=str(path))
    if basis.content_hash() != noted:
        raise AdapterError(
            f"{path}: its header belongs to other numbers ({noted[:12]}, found {basis.content_hash()[:12]});"
            f" {_CURE}"
        )
    return basis


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, and what the header says of them."""
    try:
        with safe_open(path, framework="pt") as stream:
            head = (stream.metadata() or {}).get(_HEAD, "{}")
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}
        told = json.loads(head)
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; a basis is one safetensors file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path}: truncated or not safetensors: {error}; {_CURE}") from None
    return tensors, told if isinstance(told, dict) else {}


def _sides(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{path}: tensor {key!r}, allowed: <module>.U and <module>.V; {_CURE}")
        found.setdefault(match["module"], {})[match["side"]] = tensor
    for name, both in found.items():
        if missing := {"U", "V"} - both.keys():
            raise AdapterError(f"{path}: {name}.{missing.pop()} is missing; {_CURE}")
    return {name: (both["U"], both["V"]) for name, both in found.items()}
