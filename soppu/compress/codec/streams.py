"""Lossless streams of numbers: integers by a Huffman code over packed groups, floats as they are.

Integers with few levels are packed into one byte first, so that the code can go below one bit a number; it is
that of raw DEFLATE (RFC 1951). Reading is safe on any bytes: what comes out has the size the caller asks
for, or `BundleError` is raised, and no more room is made than a stream of that length can fill.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from soppu.errors import BundleError

Floats = NDArray[np.float32]
LARGEST_FLOAT = 65504.0  # of float16; no float is larger, whatever its width, lest a product overflows
_MOST = 1032  # bytes that one byte of DEFLATE can become
_MOST_HUFFMAN = 8  # and without repeats, where a byte takes a bit or more
_MOST_LENGTH = (1 << 32) - 1
_GROUPS = {2: 3, 7: 2}  # limit -> numbers a byte holds: 5^3 = 125, 15^2 = 225


def pack(values: NDArray[np.int8] | Floats, limit: int) -> bytes:
    """Code integers from -limit to limit. O(size).

    Raises:
        BundleError: a number is out of range.
    """
    if not values.size:
        return b""
    if not (values.min() >= -limit and values.max() <= limit):
        raise BundleError(f"a number of {values.min()} or {values.max()}, allowed: -{limit} to {limit}")
    digits = (values.reshape(-1).astype(np.int16) + limit).astype(np.uint8)
    group = _GROUPS.get(limit, 1)
    if group > 1:
        rest = -len(digits) % group
        rows = np.concatenate([digits, np.full(rest, limit, np.uint8)]).reshape(-1, group)
        digits = rows[:, 0].copy()
        for column in range(1, group):
            digits = digits * np.uint8(2 * limit + 1) + rows[:, column]
    return deflate(digits.tobytes(), huffman=True)


def unpack(data: bytes, *, count: int, limit: int, source: str) -> NDArray[np.int8]:
    """The `count` integers that `pack` coded. O(count).

    Raises:
        BundleError: the stream does not hold exactly that many, or one is out of range.
    """
    return Digits(data, count=count, limit=limit, source=source).take(0, count)


class Digits:
    """What `pack` coded, inflated and checked as a whole, and taken apart where it is asked for."""

    def __init__(self, data: bytes, *, count: int, limit: int, source: str) -> None:
        """O(count). Raises BundleError as `unpack`."""
        self._limit, self._group = limit, _GROUPS.get(limit, 1)
        if not count and data:
            raise BundleError(f"{source}: a stream of {len(data)} bytes for no numbers")
        size = -(-count // self._group)
        raw = inflate(data, size=size, source=source, huffman=True) if count else b""
        self._packed = np.frombuffer(raw, np.uint8)
        if count and self._packed.max() >= self._base**self._group:
            raise BundleError(
                f"{source}: byte {self._packed.max()} in a stream of numbers from -{limit} to {limit}"
            )

    @property
    def _base(self) -> int:
        return 2 * self._limit + 1

    def take(self, begin: int, end: int) -> NDArray[np.int8]:
        """The integers from `begin` up to, not including, `end`. O(end - begin)."""
        group = self._group
        first = begin // group
        packed = self._packed[first : -(-end // group)]
        if group == 1:
            return (packed.astype(np.int16) - self._limit).astype(np.int8)
        digits = np.empty((len(packed), group), np.uint8)
        for column in reversed(range(group)):
            packed, digits[:, column] = np.divmod(packed, np.uint8(self._base))
        chosen = digits.reshape(-1)[begin - first * group : end - first * group]
        return (chosen.astype(np.int16) - self._limit).astype(np.int8)


def pack_floats(values: Floats, width: int) -> bytes:
    """Floats of 16 or 32 bits, little-endian. BundleError for NaN and what is beyond +-65504. O(size)."""
    if not (np.abs(values) <= LARGEST_FLOAT).all():
        raise BundleError(f"a number that is NaN or beyond {LARGEST_FLOAT:g}")
    return values.astype(_kind(width)).tobytes()


def unpack_floats(data: bytes, *, count: int, width: int, source: str) -> Floats:
    """The `count` floats that `pack_floats` kept. BundleError: another number of bytes, or out of range."""
    if 8 * len(data) != count * width:
        raise BundleError(f"{source}: {len(data)} bytes for {count} floats of {width} bits")
    made = np.frombuffer(data, _kind(width)).astype(np.float32)
    if not (np.abs(made) <= LARGEST_FLOAT).all():
        raise BundleError(f"{source}: NaN, or a float beyond {LARGEST_FLOAT:g}")
    return made


def deflate(data: bytes, *, huffman: bool = False) -> bytes:
    """Raw DEFLATE; `huffman` leaves out the search for repeats, which numbers without order do not have."""
    if not data:
        return b""
    strategy = zlib.Z_HUFFMAN_ONLY if huffman else zlib.Z_DEFAULT_STRATEGY
    maker = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return maker.compress(data) + maker.flush()


def inflate(data: bytes, *, size: int, source: str, huffman: bool = False) -> bytes:
    """Exactly `size` bytes out of a whole raw DEFLATE stream; never makes more than that. O(size).

    Args:
        huffman: the stream holds no repeats, and so at most 8 bytes for each of its own.

    Raises:
        BundleError: damaged, another size, or more than a stream of this length can hold.
    """
    if size > (_MOST_HUFFMAN if huffman else _MOST) * len(data):
        raise BundleError(f"{source}: {size} bytes announced, a stream of {len(data)} cannot hold them")
    if not size and not data:
        return b""
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        made = reader.decompress(data, size + 1)
    except zlib.error as error:
        raise BundleError(f"{source}: a stream is damaged: {error}") from None
    if len(made) != size or not reader.eof or reader.unused_data:
        raise BundleError(f"{source}: a stream without an end, or not of {size} bytes")
    return made


def join(parts: Sequence[bytes]) -> bytes:
    """Byte strings in a row, their lengths (u32, little-endian) before them. BundleError above 4 GiB."""
    if max(map(len, parts)) > _MOST_LENGTH:
        raise BundleError(f"a stream of {max(map(len, parts))} bytes, allowed: up to {_MOST_LENGTH}")
    return struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)


def split(data: bytes, *, count: int, source: str) -> list[bytes]:
    """The `count` byte strings that `join` put together. BundleError unless they fill the data exactly."""
    head = 4 * count
    if len(data) < head:
        raise BundleError(f"{source}: {len(data)} bytes, the lengths of {count} streams take {head}")
    sizes = struct.unpack(f"<{count}I", data[:head])
    if sum(sizes) != len(data) - head:
        raise BundleError(f"{source}: streams of {sum(sizes)} bytes announced, {len(data) - head} there")
    ends = [head, *(head + size for size in accumulate(sizes))]
    return [data[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def _kind(width: int) -> str:
    return "<f2" if width == 16 else "<f4"
