"""Bytes of a bundle file: one safetensors file, one metadata key, a digest over both.

docs/format.md describes the file byte by byte; whoever changes one changes the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from soppu.errors import BundleError

FORMAT = 2
METADATA_KEY = "soppu"
_MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
_BLANK = "0" * 64
_DTYPES = ("U8", "F16", "BF16", "F32", "F64")


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The file that holds `tensors`; equal content gives equal bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    blank = f'{{{_content(_BLANK)},"format":{FORMAT}}}'
    return save(whole, metadata={METADATA_KEY: blank.replace(_BLANK, _digest(blank, whole))})


def decode(data: bytes, *, source: str) -> dict[str, Tensor]:
    """The tensors of a bundle file, the bytes checked: nothing yet is known about what they mean.

    Raises:
        BundleError: truncated, not safetensors, no SOPPU metadata, another format version, or damaged.
    """
    header = _header(data, source)
    found = header.get("__metadata__")
    text = found.get(METADATA_KEY) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise BundleError(f"{source}: no {METADATA_KEY!r} in the metadata: not a SOPPU bundle")
    metadata = parse(text, source)
    version = metadata.get("format")
    if type(version) is not int or version != FORMAT:
        known = f"this version of SOPPU reads {FORMAT}; compress the adapters again"
        raise BundleError(f"{source}: format version {version!r}, {known}")
    for name, entry in header.items():
        if name != "__metadata__" and (not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES):
            raise BundleError(f"{source}: tensor {name[:60]!r} is not one of {', '.join(_DTYPES)}")
    try:
        tensors = load(data)
    except (SafetensorError, AssertionError, RuntimeError, ValueError, OverflowError) as error:
        raise BundleError(f"{source}: truncated or not safetensors: {error}") from None
    _check_content(text, metadata.get("content"), tensors, source)
    return tensors


def parse(text: str, source: str) -> dict[str, Any]:
    """A JSON object of finite numbers and whole strings, no key of it twice. Raises BundleError. O(size)."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object)
        if "\\u" in text:  # an escape can stand for half a character, which no text file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source}: metadata is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{source}: metadata holds a {type(value).__name__}, expected an object")
    return value


def _header(data: bytes, source: str) -> dict[str, Any]:
    if len(data) < 8:
        raise BundleError(f"{source}: truncated: {len(data)} bytes, a header length takes 8")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MOST_HEADER_BYTES, len(data) - 8):
        rest = f"a header of {length} bytes, {len(data) - 8} bytes follow"
        raise BundleError(f"{source}: truncated or not safetensors: {rest}")
    try:
        text = data[8 : 8 + length].decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{source}: not safetensors: header is not UTF-8: {error}") from None
    if not text.rstrip(" ").endswith("}"):
        raise BundleError(f"{source}: not safetensors: the header does not end in '}}' and spaces")
    return parse(text, source)


def _check_content(text: str, digest: object, tensors: Mapping[str, Tensor], source: str) -> None:
    if not isinstance(digest, str) or len(digest) != len(_BLANK) or text.count(_content(digest)) != 1:
        raise BundleError(f"{source}: metadata has no content digest")
    blank = text.replace(_content(digest), _content(_BLANK), 1)
    if (found := _digest(blank, tensors)) != digest:
        raise BundleError(f"{source}: damaged: content digest {found[:12]}, the metadata says {digest[:12]}")


def _digest(blank: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata, its digest blank, then each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(blank.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _content(digest: str) -> str:
    return f'"content":"{digest}"'


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:60]} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:60]!r} is there twice")
    return made
