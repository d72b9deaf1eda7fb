"""A bundle as one safetensors file, format 2, and back. The bytes of its parts are made elsewhere.

Everything large is a stream of bytes in a tensor of its own; the metadata is compressed JSON. Nothing a file
says is believed before it has been checked: `schema` checks the metadata, the streams check themselves.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as show
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from soppu.compress.bundle import envelope, schema
from soppu.compress.bundle.report import SETTINGS, CompressionReport
from soppu.compress.codec import basis, streams
from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import Page
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components
from soppu.cores.core import MOST_OWN
from soppu.errors import BundleError

if TYPE_CHECKING:
    from soppu.compress.bundle.bundle import Bundle

FIELDS = ("base_model", "base_hash", "fan_in_fan_out")  # of a Bundle, as they are in the metadata
_LISTS = ("users", "adapter_ids", "basis_saw")
_FREE_METADATA = 1 << 20  # bytes of JSON in any file
_METADATA_SHARE = 8  # and for each byte of the file
_MOST_METADATA = 1 << 28


def encode(bundle: Bundle) -> bytes:
    """The file of a bundle. O(size).

    Raises:
        BundleError: a bundle that the format cannot hold, such as one with a NaN in its report.
    """
    meta = _metadata(bundle)
    schema.check(meta, "bundle")
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    tensors = _tensors(bundle) | {"meta": _bytes(zlib.compress(text.encode(), 9))}
    schema.check_tensors(meta, tensors, "bundle")
    data = envelope.encode(tensors)
    if len(text) > _most_text(len(data)):
        raise BundleError(
            f"{len(text)} bytes of metadata, allowed in a file of {len(data)}: {_most_text(len(data))}"
        )
    return data


def _tensors(bundle: Bundle) -> dict[str, Tensor]:
    report, names = bundle.report, list(bundle.shapes)
    certificates = [report.certificates[name] for name in names]
    flat = [side for name in names for pair in bundle.bases[name] for side in pair]
    errors = [[report.module_error[name].get(user, 0.0) for user in bundle.users] for name in names]
    tensors = {
        "bases": _bytes(basis.encode(flat)),
        "ranks": _packed_counts(bundle.ranks, "rank"),
        "cluster": _packed_counts(bundle.cluster, "cluster"),
        "norm": bundle.norm.float(),
        "error": torch.tensor([report.relative_error[user] for user in bundle.users]),
        "module_error": torch.tensor(errors).half(),
        "certificates": torch.tensor(
            [[c.lower_bound, c.achieved, c.upper_bound, c.total, 1 - c.confidence] for c in certificates]
        ),
    }
    return tensors | {f"page.{number}": _bytes(one.data) for number, one in enumerate(bundle.pages)}


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file says of itself, checked, before anything of a user's is decoded."""

    meta: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Tensor  # (modules, n) int64
    cluster: Tensor  # (n,) int64


def contents(tensors: Mapping[str, Tensor], size: int, *, source: str) -> Contents:
    """The contents of a file of `size` bytes; no page's bytes are looked at. O(n). Raises BundleError."""
    meta = envelope.parse(_metadata_text(tensors, size, source), source)
    schema.check(meta, source)
    schema.check_tensors(meta, tensors, source)
    modules, n = len(meta["modules"]), len(meta["users"])
    shapes = {entry["name"]: (entry["out"], entry["in"]) for entry in meta["modules"]}
    ranks = _counts(tensors["ranks"], (modules, n), f"{source}: ranks")
    cluster = _counts(tensors["cluster"], (n,), f"{source}: cluster")
    schema.check_members(meta, ranks, cluster, source)
    return Contents(meta, shapes, ranks, cluster)


def decode(data: bytes, *, source: str) -> dict[str, Any]:
    """The fields of the Bundle in a file of format 2. Its pages are for `check_page`. Raises BundleError."""
    tensors = envelope.decode(data, source=source)
    held = contents(tensors, len(data), source=source)
    meta = held.meta
    firsts = np.cumsum([0, *meta["pages"]]).tolist()
    pages = tuple(
        Page(first, users, tensors[f"page.{number}"].numpy().tobytes())
        for number, (first, users) in enumerate(zip(firsts, meta["pages"], strict=False))
    )
    return dict(
        **{name: meta[name] for name in FIELDS},
        **{name: tuple(meta[name]) for name in _LISTS},
        common=meta.get("common", 0),
        shapes=held.shapes,
        ranks=held.ranks,
        bases=decode_bases(meta, tensors["bases"].numpy().tobytes(), source),
        cluster=held.cluster,
        norm=tensors["norm"],
        pages=pages,
        report=_report(meta, tensors, held.ranks),
    )


def check_page(bundle: Bundle, number: int, *, source: str) -> None:
    """Decode a page and hold its components against what the bundle says of its users. O(size).

    Raises:
        BundleError: a page that is damaged, or holds more than its users can have.
    """
    try:
        parts = bundle.components(number)
    except BundleError as error:
        raise BundleError(f"{source}: {error}") from None
    first, users = bundle.pages[number].first, bundle.pages[number].users
    own, norm = bundle.ranks[:, first : first + users], bundle.norm[first : first + users]
    names = bundle.users[first : first + users]
    moved = [part.renumbered(torch.arange(first + users) - first) for part in parts]
    check_parts(moved, Held(bundle.shapes, bundle.bases, own, norm, names), source=f"{source}: page {number}")


@dataclass(frozen=True, eq=False)
class Held:
    """What is known of some users: ranks (modules, n), norms (n,), names."""

    shapes: Mapping[str, tuple[int, int]]
    bases: Mapping[str, Sequence[Bases]]
    ranks: Tensor
    norm: Tensor
    names: Sequence[str]


def check_parts(parts: Sequence[Components], held: Held, *, source: str) -> None:
    """Hold components, their users numbered from 0, against what is known of these users. O(components).

    Raises:
        BundleError: more components than a user can have, or a gain that is no number.
    """
    for (name, shape), part, own in zip(held.shapes.items(), parts, held.ranks, strict=True):
        if not len(part):
            continue
        k = max(side.k for side in held.bases[name][0])
        # a full core and what is beside it may together be more than the module's shape has room for
        most = torch.where(own > 0, own.clamp(max=min(shape) + MOST_OWN).clamp(min=k), 0)
        counts = torch.bincount(part.user, minlength=len(own))
        if bool((counts > most).any()):
            user = int((counts > most).nonzero()[0])
            found = f"{int(counts[user])} components of {show(held.names[user])}"
            allowed = f"allowed: {int(most[user])}, whose rank is {int(own[user])}"
            raise BundleError(f"{source}: {name}: {found}, {allowed}")
        if not bool(torch.isfinite(part.gain * held.norm[part.user]).all()):
            raise BundleError(f"{source}: {name}: a gain times a norm is not a finite number")


def _metadata(bundle: Bundle) -> dict[str, Any]:
    report = bundle.report
    return {
        **{name: getattr(bundle, name) for name in FIELDS},
        **{name: list(getattr(bundle, name)) for name in _LISTS},
        **({"common": bundle.common} if bundle.common else {}),
        "clusters": len(next(iter(bundle.bases.values()))),
        "pages": [one.users for one in bundle.pages],
        "modules": [
            {
                "name": name,
                "out": o,
                "in": i,
                "k": [bundle.bases[name][0][0].k, bundle.bases[name][0][1].k],
                "widths": [[out.width, inn.width] for out, inn in bundle.bases[name]],
            }
            for name, (o, i) in bundle.shapes.items()
        ],
        "report": report.settings() | {"steps": list(report.steps.values())},
    }


def decode_bases(meta: Mapping[str, Any], data: bytes, source: str) -> dict[str, tuple[Bases, ...]]:
    """Module -> output and input basis of every cluster, of the metadata's modules. Raises BundleError."""
    flat = [
        (width, k, d)
        for entry in meta["modules"]
        for widths in entry["widths"]
        for width, k, d in zip(widths, entry["k"], (entry["out"], entry["in"]), strict=True)
    ]
    sides = iter(basis.decode(data, flat, source=f"{source}: bases"))
    return {
        entry["name"]: tuple((next(sides), next(sides)) for _ in range(meta["clusters"]))
        for entry in meta["modules"]
    }


def _report(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], ranks: Tensor) -> CompressionReport:
    names = [entry["name"] for entry in meta["modules"]]
    users = meta["users"]
    table = tensors["module_error"].float()
    return CompressionReport(
        **{key: meta["report"][key] for key in SETTINGS},
        seconds=0.0,
        steps=dict(zip(names, meta["report"]["steps"], strict=True)),
        k_used={entry["name"]: max(entry["k"]) for entry in meta["modules"]},
        relative_error=dict(zip(users, tensors["error"].tolist(), strict=True)),
        module_error={
            name: {user: e for user, e, r in zip(users, row.tolist(), rank.tolist(), strict=True) if r}
            for name, row, rank in zip(names, table, ranks, strict=True)
        },
        certificates={
            name: Certificate(row[0], row[1], row[2], row[3], confidence=1 - row[4])
            for name, row in zip(names, tensors["certificates"].tolist(), strict=True)
        },
    )


def _packed_counts(counts: Tensor, what: str) -> Tensor:
    if int(counts.max()) > schema.MOST_U16:
        raise BundleError(f"{what} {int(counts.max())}, allowed: up to {schema.MOST_U16}")
    return _bytes(streams.deflate(counts.numpy().astype("<u2").tobytes()))


def _counts(tensor: Tensor, shape: tuple[int, ...], source: str) -> Tensor:
    size = 2 * int(np.prod(shape))
    raw = streams.inflate(tensor.numpy().tobytes(), size=size, source=source)
    return torch.from_numpy(np.frombuffer(raw, "<u2").reshape(shape).astype(np.int64))


def _most_text(size: int) -> int:
    """Bytes of JSON that a file of `size` bytes may hold: text that unfolds into more was made to do harm."""
    return min(_FREE_METADATA + _METADATA_SHARE * size, _MOST_METADATA)


def _metadata_text(tensors: Mapping[str, Tensor], size: int, source: str) -> str:
    packed = tensors.get("meta")
    if packed is None or packed.dtype != torch.uint8 or packed.ndim != 1:
        raise BundleError(f"{source}: tensor 'meta' is missing or not a row of bytes")
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(packed.numpy().tobytes(), _most_text(size) + 1)
        if len(text) > _most_text(size) or not reader.eof or reader.unused_data:
            found = f"{len(text)} bytes or more, allowed: {_most_text(size)}"
            raise BundleError(f"{source}: the metadata does not end where it should: {found}")
        return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise BundleError(f"{source}: the metadata is damaged: {error}") from None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
