"""StoredFile: a bundle file on a disk, read tensor by tensor: never all of it, never into Python objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from soppu.compress.bundle import envelope
from soppu.errors import BundleError


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file, and what it is."""

    begin: int  # counted from the beginning of the file
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredFile:
    """An open bundle file; what is written in its place meanwhile does not change what is read.

    `read` may be called from any thread.
    """

    def __init__(self, path: Path) -> None:
        """O(1). Raises BundleError for a file that cannot be opened."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            found = os.fstat(self._file.fileno())
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
        self.size, self.modified = found.st_size, found.st_mtime_ns

    def read(self, begin: int, size: int) -> bytes:
        """Bytes of the file. BundleError where they cannot be read, or the file has become shorter."""
        parts, left = [], size
        try:
            while left and (part := os.pread(self._file.fileno(), left, begin + size - left)):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if left:
            raise BundleError(f"{self.path}: {size - left} of {size} bytes at {begin}: the file was cut off")
        return b"".join(parts)

    def head(self) -> bytes:
        """The header as it stands, whose digest covers all the rest. BundleError: there is none."""
        length = envelope.header_length(self.read(0, min(8, self.size)), self.size, str(self.path))
        return self.read(8, length)

    def header(self) -> tuple[str, dict[str, Entry]]:
        """The text of the metadata, and where every tensor is. O(header).

        Raises:
            BundleError: not safetensors, no bundle, another format, or tensors that overlap or leave gaps.
        """
        source, data = str(self.path), self.head()
        header = envelope.parse_header(data, source)
        text = envelope.announced(header, source)
        try:
            with safe_open(
                self.path, framework="pt"
            ):  # which holds offsets, shapes and types against each other
                pass
        except (*envelope.REFUSALS, OSError) as error:
            raise BundleError(f"{source}: truncated or not safetensors: {error}") from None
        named = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return text, {name: _entry(entry, 8 + len(data)) for name, entry in named.items()}

    def tensor(self, entry: Entry) -> Tensor:
        """One tensor, read. BundleError as `read`."""
        data = self.read(entry.begin, entry.size)
        if not data:
            return torch.zeros(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(bytearray(data), dtype=entry.dtype).view(entry.shape)


def blank(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Tensors of these shapes and types without bytes."""
    return {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in entries.items()}


def _entry(entry: Mapping[str, Any], start: int) -> Entry:
    begin, end = entry["data_offsets"]
    return Entry(start + begin, end - begin, envelope.DTYPES[entry["dtype"]], tuple(entry["shape"]))
