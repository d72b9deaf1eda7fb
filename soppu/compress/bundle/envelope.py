"""Bytes of a bundle file: one safetensors file, one metadata key, a digest over both.

docs/format.md describes the file byte by byte; whoever changes one changes the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
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
DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
REFUSALS = (SafetensorError, AssertionError, RuntimeError, ValueError, OverflowError)  # of the library


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The file that holds `tensors`; equal content gives equal bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    blank = f'{{{_content(_BLANK)},"format":{FORMAT}}}'
    digest = _digest(blank, whole, lambda name: tensor_bytes(whole[name]))
    return save(whole, metadata={METADATA_KEY: blank.replace(_BLANK, digest)})


def decode(data: bytes, *, source: str) -> dict[str, Tensor]:
    """The tensors of a bundle file, the bytes checked: nothing yet is known about what they mean.

    Raises:
        BundleError: truncated, not safetensors, no SOPPU metadata, another format version, or damaged.
    """
    digest = announced(_header(data, source), source)
    try:
        tensors = load(data)
    except REFUSALS as error:
        raise BundleError(f"{source}: truncated or not safetensors: {error}") from None
    check_content(digest, tensors, lambda name: tensor_bytes(tensors[name]), source)
    return tensors


def announced(header: Mapping[str, Any], source: str) -> str:
    """The text of the metadata in a file's header. BundleError for another format or kind of file."""
    found = header.get("__metadata__")
    text = found.get(METADATA_KEY) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise BundleError(f"{source}: no {METADATA_KEY!r} in the metadata: not a SOPPU bundle")
    version = parse(text, source).get("format")
    if type(version) is not int or version != FORMAT:
        known = f"this version of SOPPU reads {FORMAT}; compress the adapters again"
        raise BundleError(f"{source}: format version {version!r}, {known}")
    for name, entry in header.items():
        if name != "__metadata__" and (not isinstance(entry, dict) or entry.get("dtype") not in DTYPES):
            raise BundleError(f"{source}: tensor {name[:60]!r} is not one of {', '.join(DTYPES)}")
    return text


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


def header_length(data: bytes, size: int, source: str) -> int:
    """Bytes of the header of a file of `size` bytes, from its first 8. BundleError: more than there are."""
    if len(data) < 8:
        raise BundleError(f"{source}: truncated: {len(data)} bytes, a header length takes 8")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MOST_HEADER_BYTES, size - 8):
        rest = f"a header of {length} bytes, {size - 8} bytes follow"
        raise BundleError(f"{source}: truncated or not safetensors: {rest}")
    return int(length)


def parse_header(data: bytes, source: str) -> dict[str, Any]:
    """A header's JSON. Raises BundleError."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{source}: not safetensors: header is not UTF-8: {error}") from None
    if not text.rstrip(" ").endswith("}"):
        raise BundleError(f"{source}: not safetensors: the header does not end in '}}' and spaces")
    return parse(text, source)


def _header(data: bytes, source: str) -> dict[str, Any]:
    return parse_header(data[8 : 8 + header_length(data, len(data), source)], source)


def check_content(text: str, tensors: Mapping[str, Tensor], read: Callable[[str], Any], source: str) -> None:
    """Hold the bytes of all tensors, `read` by name, against the metadata's digest. BundleError. O(size)."""
    digest = parse(text, source).get("content")
    if not isinstance(digest, str) or len(digest) != len(_BLANK) or text.count(_content(digest)) != 1:
        raise BundleError(f"{source}: metadata has no content digest")
    blank = text.replace(_content(digest), _content(_BLANK), 1)
    if (found := _digest(blank, tensors, read)) != digest:
        raise BundleError(f"{source}: damaged: content digest {found[:12]}, the metadata says {digest[:12]}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(blank: str, tensors: Mapping[str, Tensor], read: Callable[[str], Any]) -> str:
    """SHA-256 over the metadata, its digest blank, then each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(blank.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        digest.update(read(name))
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
