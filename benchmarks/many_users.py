"""A bundle of any number of users, written to a disk page by page: nothing of it is held in memory but names.

Users have the pipeline's shape (q, v, o and down of the last four layers), 8 components a module with small
integers of their own and coordinates on both sides. A few pages are distinct and are repeated; every user has
a name and a norm of their own. The file is one that `Bundle.save` might have written.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import served
from soppu.compress import Bundle
from soppu.compress.bundle import envelope
from soppu.compress.codec import basis, streams
from soppu.compress.codec.page import PageWriter
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import quantise
from tests.soppu.compress.handmade import Plan, components, make

COMPONENTS, WIDTH, RANK = 8, 2, 16
PAGE, DISTINCT = 5, 4  # users of a page, which `PageWriter` would close after 7; distinct pages
_FORM = (8, WIDTH, 8, WIDTH)


def example(components_each: int = COMPONENTS) -> Bundle:
    """The distinct pages and the bases, as a bundle of their own."""
    forms, k = [[_FORM] * components_each] * PAGE, (RANK, RANK)
    generator, writer = torch.Generator().manual_seed(0), PageWriter()
    for _ in range(DISTINCT):
        parts = [components(forms, shape, k, generator) for shape in served.PIPELINE.values()]
        writer.add([_normal(part, generator) for part in parts], users=PAGE)
        writer.close()
    made, pages = make(Plan(forms[:1], served.PIPELINE, k=k, widths=(8, 8)), seed=0), writer.close()
    if [page.users for page in pages] != [PAGE] * DISTINCT:
        raise ValueError(f"{components_each} components each: {PAGE} users fill more than one page")
    return replace(made, pages=pages)


def _normal(part: Components, generator: torch.Generator) -> Components:
    """The same with own numbers that are quantised from a normal distribution, as adapters' nearly are."""

    def side(one: Side) -> Side:
        return replace(one, own=quantise(torch.randn(one.own.shape, generator=generator), WIDTH))

    return replace(part, left=side(part.left), right=side(part.right), gain=part.gain.abs().clamp(0.5, 2.0))


def name(number: int) -> str:
    """What a user is called."""
    return f"user{number:07d}"


def write(path: Path, users: int, *, components_each: int = COMPONENTS) -> str:
    """Write a bundle of so many users, a multiple of PAGE; its id. O(size), in memory O(users)."""
    base, made = served.base(), example(components_each)
    pages = [page.data for page in made.pages]
    tensors = _tensors(made, users, base_name=base.name, base_hash=base.hash)
    sizes = {name: array.nbytes for name, array in tensors.items()}
    sizes |= {f"page.{number}": len(pages[number % DISTINCT]) for number in range(users // PAGE)}

    def data(name: str) -> bytes:
        if name in tensors:
            return tensors[name].tobytes()
        return pages[int(name.removeprefix("page.")) % DISTINCT]

    header = _header(tensors, sizes, data)
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for part in _file(header, sizes, data):
            digest.update(part)
            out.write(part)
    return digest.hexdigest()


def _tensors(made: Bundle, users: int, *, base_name: str, base_hash: str) -> dict[str, np.ndarray]:
    """All but the pages."""
    modules, names = len(made.shapes), [name(number) for number in range(users)]
    report = made.report.settings() | {"steps": list(made.report.steps.values())}
    meta: dict[str, Any] = {
        "users": names,
        "adapter_ids": [f"a-{number:016x}" for number in range(users)],
        "base_model": base_name,
        "base_hash": base_hash,
        "basis_saw": [],
        "fan_in_fan_out": False,
        "clusters": 1,
        "pages": [PAGE] * (users // PAGE),
        "modules": [
            {"name": key, "out": o, "in": i, "k": [RANK, RANK], "widths": [[8, 8]]}
            for key, (o, i) in made.shapes.items()
        ],
        "report": report,
    }
    text = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
    ranks = streams.deflate(np.full((modules, users), RANK, "<u2").tobytes())
    rng = np.random.default_rng(0)
    sides = [side for clusters in made.bases.values() for pair in clusters for side in pair]
    return {
        "meta": _bytes(zlib.compress(text, 6)),
        "bases": _bytes(basis.encode(sides)),
        "ranks": _bytes(ranks),
        "cluster": _bytes(streams.deflate(bytes(2 * users))),
        # enough to change a text, another one for everybody
        "norm": (0.02 + 0.02 * rng.random(users)).astype(np.float32),
        "error": np.full(users, 0.25, np.float32),
        "module_error": np.full((modules, users), 0.25, np.float16),
        "certificates": np.tile(np.array([0.1, 0.2, 0.4, 2.0, 0.0], np.float32), (modules, 1)),
    }


def _header(tensors: dict[str, np.ndarray], sizes: dict[str, int], data: Any) -> bytes:
    """The header, the content digest in it."""
    names = {np.dtype(np.uint8): ("U8", "uint8"), np.dtype(np.float16): ("F16", "float16")}
    names[np.dtype(np.float32)] = "F32", "float32"
    kinds = {key: (*names[array.dtype], array.shape) for key, array in tensors.items()}
    blank = '{"content":"' + "0" * 64 + f'","format":{envelope.FORMAT}}}'
    digest, at, header = hashlib.sha256(blank.encode()), 0, dict[str, Any]()
    for key in sorted(sizes):
        kind = kinds.get(key, ("U8", "uint8", (sizes[key],)))
        shape = ",".join(map(str, kind[2]))
        digest.update(f"\n{key} {kind[1]} {shape}\n".encode())
        digest.update(data(key))
    for key in _order(sizes):
        kind = kinds.get(key, ("U8", "uint8", (sizes[key],)))
        header[key] = {"dtype": kind[0], "shape": list(kind[2]), "data_offsets": [at, at + sizes[key]]}
        at += sizes[key]
    header["__metadata__"] = {envelope.METADATA_KEY: blank.replace("0" * 64, digest.hexdigest())}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(sizes: dict[str, int]) -> list[str]:
    """Wide types first, so that they are aligned."""
    first = ["norm", "error", "certificates", "module_error"]
    return [*first, *sorted(key for key in sizes if key not in first)]


def _file(header: bytes, sizes: dict[str, int], data: Any) -> Iterator[bytes]:
    yield header
    for key in _order(sizes):
        yield data(key)


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
