"""Index: what a server has to know of a bundle file beside its pages, in a file of its own that is mapped.

`<bundle file>.index` is made where the file is first opened, and costs reading it once: its SHA-256, which is
the bundle id, its content digest and its metadata are checked then, and a checksum of each page is written
down. From then on opening it takes O(1) in what its users have: a file of the same size, time and header,
which holds the content digest, is the one that was checked. It can be deleted at any time. Nothing reads it
but this version of SOPPU.

    32 bytes    SHA-256 of the rest
    the rest    a safetensors file: `head`, JSON, and the arrays
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from soppu import files
from soppu.compress.bundle import container, envelope, users
from soppu.compress.bundle.stored import Entry, StoredFile, blank
from soppu.errors import BundleError, StorageError

_LOG = logging.getLogger(__name__)
_VERSION = 1
_SUFFIX = ".index"
_MAGIC = 32
_KINDS = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
}
Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Index:
    """The facts about a bundle, and its arrays.

    By user: names and hashes, norm, cluster, ranks (n, M); by page: first users (one more than there are
    pages), begins, sizes, checksums.
    """

    head: Mapping[str, Any]
    arrays: Arrays


def path_of(path: Path) -> Path:
    """Where the index of a bundle file lies."""
    return path.with_name(path.name + _SUFFIX)


def of(stored: StoredFile, *, expected_hash: str = "") -> Index:
    """The index of a bundle file: the one beside it, or a new one, written there where that may be.

    Raises:
        BundleError: not a bundle, damaged, or another one than `expected_hash` names.
    """
    found = _read(stored)
    if found is None:
        head, arrays = _make(stored, expected_hash)
        found = Index(head, arrays)
        try:
            files.write_bytes(path_of(stored.path), _encode(head, arrays))
        except StorageError as error:
            _LOG.warning("no index can be kept, so every start reads the whole bundle: %s", error)
    if expected_hash and found.head["bundle_id"] != expected_hash:
        raise _another(stored, found.head["bundle_id"], expected_hash)
    return found


def _another(stored: StoredFile, found: str, expected: str) -> BundleError:
    return BundleError(f"{stored.path}: SHA-256 is {found[:12]}, expected {expected[:12]}")


def _make(stored: StoredFile, expected: str) -> tuple[dict[str, Any], Arrays]:
    """Check the whole file, and write down what it says. O(size), in memory O(n)."""
    source, sums, entries = str(stored.path), dict[str, int](), dict[str, Entry]()

    def read(name: str) -> bytes:
        data = stored.read(entries[name].begin, entries[name].size)
        sums[name] = zlib.crc32(data)
        return data

    with ThreadPoolExecutor(1) as pool:  # two digests of all bytes, beside each other
        whole = pool.submit(files.sha256_file, stored.path)
        try:
            text, entries = stored.header()
            envelope.check_content(text, blank(entries), read, source)
        except BundleError:
            if not expected or whole.result() == expected:
                raise
        bundle_id = whole.result()
    if expected and bundle_id != expected:
        raise _another(stored, bundle_id, expected)
    small = {name: stored.tensor(e) for name, e in entries.items() if not name.startswith("page.")}
    held = container.contents(blank(entries) | small, stored.size, source=source)
    meta, pages = held.meta, [entries[f"page.{number}"] for number in range(len(held.meta["pages"]))]
    head = {name: meta[name] for name in (*container.FIELDS, "clusters", "modules")}
    head |= {"bundle_id": bundle_id, **_identity(stored)}
    head["bases"] = [entries["bases"].begin, entries["bases"].size, sums["bases"]]
    head["worst_error"] = float(small["error"].max())
    arrays: dict[str, NDArray[np.generic]] = {
        **users.pack(meta["users"]),
        "norm": small["norm"].numpy(),
        "cluster": held.cluster.numpy().astype(np.uint16),
        "ranks": np.ascontiguousarray(held.ranks.numpy().T.astype(np.uint16)),
        "firsts": np.cumsum([0, *meta["pages"]]),
        "begins": np.array([page.begin for page in pages]),
        "sizes": np.array([page.size for page in pages]),
        "sums": np.array([sums[f"page.{number}"] for number in range(len(pages))], np.uint32),
    }
    return head, arrays


def _encode(head: Mapping[str, Any], arrays: Arrays) -> bytes:
    whole = {**arrays, "head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    data = save(dict(whole))
    return hashlib.sha256(data).digest() + data


def _read(stored: StoredFile) -> Index | None:
    """The index beside a file; None where there is none that fits it. O(index)."""
    path = path_of(stored.path)
    try:
        with path.open("rb") as stream:
            digest = stream.read(_MAGIC)
            if hashlib.file_digest(stream, "sha256").digest() != digest:
                raise ValueError("its checksum is another one")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = _mapped(data)
        head = json.loads(arrays.pop("head").tobytes())
        fits = all(head[key] == value for key, value in _identity(stored).items())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        _LOG.warning("%s: not read, the bundle is read whole instead: %s", path, error)
        return None
    return Index(head, arrays) if fits else None


def _identity(stored: StoredFile) -> dict[str, Any]:
    """What a file has to have in common with the one that was checked. BundleError: it has no header."""
    header = hashlib.sha256(stored.head()).hexdigest()
    return {"size": stored.size, "modified": stored.modified, "header": header, "version": _VERSION}


def _mapped(data: mmap.mmap) -> dict[str, NDArray[np.generic]]:
    """The arrays of a safetensors file behind the digest, as they lie in the mapping."""
    (length,) = struct.unpack("<Q", data[_MAGIC : _MAGIC + 8])
    start = _MAGIC + 8 + length
    header = json.loads(data[_MAGIC + 8 : start])
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, count = _KINDS[entry["dtype"]], int(np.prod(entry["shape"]))
            flat = np.frombuffer(data, kind, count, start + entry["data_offsets"][0])
            arrays[name] = flat.reshape(entry["shape"])
    return arrays
