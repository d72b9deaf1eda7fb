"""Bundle files taken apart, changed at any depth, and put together again with every length and digest right.

A lie that is not damage: only so do wrong bytes reach the readers of streams, pages and metadata.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from soppu.compress.codec import modes

_SPELLING = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ITEM = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_PAGE_STREAMS = 4 + len(modes.NUMBERS)
_BASIS_STREAMS = 8
_INTEGERS = (-1, 0, 1, 2, 3, 7, 255, 65535, 65536, 1 << 24, 10**12, 1 << 31, 1 << 63, 1 << 64, 10**300)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\ud800", 0.5, -0.0, 1.0, 1e308),
    *([], {}, [0], [[0, 0]], ["user0"], {"q": 1}),
)
_TEXTS = (
    *("NaN", "Infinity", "1e999", "1" * 5000, "[" * 5000, '{"a":1,"a":2}', '"\\udc00"', "-"),
    '"' + "x" * 70 + '"',
)
_BLANK = "0" * 64


@dataclass
class File:
    """A bundle file in parts: its metadata, and for each tensor its type, shape and bytes."""

    meta: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]
    inner: Any = None  # metadata of format 2, from the tensor `meta`

    @classmethod
    def open(cls, data: bytes) -> File:
        """The parts of a sound file."""
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        meta = json.loads(header.pop("__metadata__")["soppu"])
        tensors = {}
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
        inner = json.loads(zlib.decompress(tensors["meta"][2])) if "meta" in tensors else None
        return cls(meta, tensors, inner)

    def close(self, *, retext: Callable[[str], str] = lambda text: text) -> bytes:
        """The file, its digest right; `retext` changes the text of the metadata."""
        if self.inner is not None:
            packed = zlib.compress(retext(_json(self.inner)).encode(errors="surrogatepass"), 9)
            self.tensors["meta"] = ("U8", [len(packed)], packed)
        blank = _json({**self.meta, "content": _BLANK})
        blank = blank if self.inner is not None else retext(blank)
        text = blank.replace(f'"content":"{_BLANK}"', f'"content":"{self._digest(blank)}"', 1)
        header: dict[str, Any] = {"__metadata__": {"soppu": text}}
        begin = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
            begin += len(data)
        head = _json(header).encode()
        head += b" " * (-len(head) % 8)
        return struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in self.tensors.values())

    def _digest(self, blank: str) -> str:
        digest = hashlib.sha256(blank.encode(errors="surrogatepass"))
        for name in sorted(self.tensors):
            dtype, shape, data = self.tensors[name]
            sizes = ",".join(map(str, shape))
            digest.update(f"\n{name} {_SPELLING.get(dtype, dtype)} {sizes}\n".encode(errors="surrogatepass"))
            digest.update(data)
        return digest.hexdigest()


def raw(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed without regard to what they mean; the digest no longer fits."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        data = scramble(data, rng)
    return data


def tensor(data: bytes, rng: random.Random) -> bytes:
    """A stream, or the numbers of a tensor, changed; lengths, shape and digest made to fit again."""
    file = File.open(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([name for name in file.tensors if name != "meta"])
        dtype, shape, held = file.tensors[name]
        if name.startswith("page.") or name == "bases":
            held = _stream(held, _PAGE_STREAMS if name.startswith("page.") else _BASIS_STREAMS, rng)
        elif name in ("ranks", "cluster"):
            held = _packed(held, rng)
        else:
            held = (scramble(held, rng) + held)[: len(held)] if rng.random() < 0.9 else scramble(held, rng)
        file.tensors[name] = _fitted(dtype, shape, held)
    if rng.random() < 0.1:
        _rename(file, rng)
    return file.close()


def metadata(data: bytes, rng: random.Random, *, texts: float = 0.2) -> bytes:
    """Values, keys or, with a chance of `texts`, the text of the metadata changed; the digest fits again."""
    file = File.open(data)
    root = file.inner if file.inner is not None else file.meta
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _revalue(root, rng)
    if rng.random() < texts:
        return file.close(retext=lambda text: _retext(text, rng))
    return file.close()


def both(data: bytes, rng: random.Random) -> bytes:
    """Metadata and tensors changed together, so that they may agree about something new."""
    return tensor(metadata(data, rng, texts=0) if rng.random() < 0.5 else _same_length(data, rng), rng)


def bomb(data: bytes, rng: random.Random) -> bytes:
    """A stream that unfolds into millions of bytes, with sizes in the metadata that may ask for them."""
    file = File.open(data)
    name = rng.choice([name for name in file.tensors if file.tensors[name][0] == "U8"] or list(file.tensors))
    size = rng.choice((1 << 20, 1 << 23, 1 << 25))
    unfolds = _unfolding(rng.choice((0, 1, 16, 112, 127)), size)
    if file.inner is not None and rng.random() < 0.7:
        entry = rng.choice(file.inner["modules"])
        entry[rng.choice(("out", "in"))] = rng.choice((size, 2 * size, size // 2, 1 << 24))
    if name == "meta":
        file.inner["padding"] = "x" * min(size, 1 << 22)
        return file.close()
    if name.startswith("page.") or name == "bases":
        parts = _split(file.tensors[name][2], _PAGE_STREAMS if name.startswith("page.") else _BASIS_STREAMS)
        parts[rng.randrange(len(parts))] = rng.choice((unfolds, bytes(1 << 16)))
        unfolds = _join(parts)
    file.tensors[name] = ("U8", [len(unfolds)], unfolds)
    return file.close()


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "raw": raw,
    "tensor": tensor,
    "metadata": metadata,
    "both": both,
    "bomb": bomb,
}


def scramble(data: bytes, rng: random.Random) -> bytes:
    """One change of some bytes: flipped, set, cut, doubled, put in or taken from elsewhere."""
    if not data:
        return rng.randbytes(rng.randrange(1, 9))
    at, size = rng.randrange(len(data)), rng.choice((1, 1, 1, 2, 4, 8, 64))
    head, here, tail = data[:at], data[at : at + size], data[at + size :]
    kind = rng.randrange(7)
    if kind == 0:
        return head + bytes([here[0] ^ 1 << rng.randrange(8)]) + here[1:] + tail
    if kind == 1:
        return head + rng.choice((b"\0", b"\1", b"\x7f", b"\xff", b"\x80")) * len(here) + tail
    if kind == 2:
        return head + rng.randbytes(len(here)) + tail
    if kind == 3:
        return head + tail
    if kind == 4:
        return head + here + here + tail
    if kind == 5:
        return head if rng.random() < 0.5 else tail
    other = rng.randrange(len(data))
    return head + data[other : other + size] + tail


def _stream(data: bytes, count: int, rng: random.Random) -> bytes:
    if len(data) < 4 * count or rng.random() < 0.1:
        return scramble(data, rng)
    parts = _split(data, count)
    if rng.random() < 0.1:
        a, b = rng.randrange(count), rng.randrange(count)
        parts[a], parts[b] = parts[b], parts[a]
        return _join(parts)
    filled = [place for place, part in enumerate(parts) if part]
    place = rng.choice(filled) if filled and rng.random() < 0.9 else rng.randrange(count)
    parts[place] = _packed(parts[place], rng)
    return _join(parts)


def _packed(data: bytes, rng: random.Random) -> bytes:
    """A stream with its content changed, where it is DEFLATE; otherwise, or by chance, with its bytes."""
    try:
        content = zlib.decompress(data, -zlib.MAX_WBITS) if data else b""
    except zlib.error:
        return scramble(data, rng)
    return scramble(data, rng) if rng.random() < 0.2 else _deflate(scramble(content, rng))


def _fitted(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
    """The bytes with a shape that fits them: the old one where it does."""
    item = _ITEM[dtype]
    data = data[: len(data) // item * item]
    size = item
    for one in shape:
        size *= one
    return dtype, (shape if size == len(data) else [len(data) // item]), data


def _rename(file: File, rng: random.Random) -> None:
    name = rng.choice(list(file.tensors))
    dtype, shape, data = file.tensors[name]
    change = rng.randrange(4)
    if change == 0:
        del file.tensors[name]
    elif change == 1:
        file.tensors["extra"] = (dtype, shape, data)
    elif change == 2:
        file.tensors[name] = (rng.choice(("U8", "I8", "F32", "F64", "BF16", "F8_E4M3", "BOOL")), shape, data)
    else:
        file.tensors[name] = (dtype, rng.choice(([], [0], [1, *shape], [0, 1 << 62], [1 << 62, 0])), data)


def _revalue(root: Any, rng: random.Random) -> None:
    """One value somewhere in a tree of JSON values changed."""
    places = _places(root)
    holder, key = rng.choice(places)
    change = rng.randrange(7)
    if change == 0 and isinstance(holder, dict):
        del holder[key]
    elif change == 1 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    elif change == 2 and isinstance(holder, list):
        del holder[key]
    elif change == 3:
        other, place = rng.choice(places)
        holder[key] = json.loads(_json(other[place]))
    elif change == 4 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, 8))
    else:
        holder[key] = rng.choice(_INTEGERS) if rng.random() < 0.5 else json.loads(_json(rng.choice(_VALUES)))


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        found.append((value, key))
        found += _places(held)
    return found


def _retext(text: str, rng: random.Random) -> str:
    """The text of the metadata with one value written as no writer writes it, or with damage."""
    places = [place for place, letter in enumerate(text) if letter == ":"]
    if not places or rng.random() < 0.3:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(("", "x", '"', "}", "\\u12", "\0")) + text[at + 1 :]
    at = rng.choice(places) + 1
    end = min(place for place in (text.find(mark, at) for mark in ",}") if place >= 0)
    return text[:at] + rng.choice(_TEXTS) + text[end:]


def _same_length(data: bytes, rng: random.Random) -> bytes:
    """Sizes of one module changed, nothing else: what the streams hold no longer is what was announced."""
    file = File.open(data)
    if file.inner is not None:
        entry = rng.choice(file.inner["modules"])
        sizes = ((entry["in"], entry["out"]), (1, 1), (1 << 24, 1), (5, 1 << 24))
        entry["out"], entry["in"] = rng.choice(sizes)
    return file.close()


def _split(data: bytes, count: int) -> list[bytes]:
    sizes, parts, at = struct.unpack_from(f"<{count}I", data), [], 4 * count
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return parts


def _join(parts: list[bytes]) -> bytes:
    return struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)


@lru_cache(maxsize=32)
def _unfolding(byte: int, size: int) -> bytes:
    return _deflate(bytes([byte]) * size)


def _deflate(data: bytes) -> bytes:
    maker = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return maker.compress(data) + maker.flush()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
