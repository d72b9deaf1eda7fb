"""Ternary numbers as bits: Golomb codes of the gaps between nonzeros, then one sign bit each.

A stream is the count of its values (u64, little-endian) and blocks of 2^20 values, the last one shorter. A
block is a header of 9 bytes (code u8, nonzeros u32, bytes of the first field u32) and fields, each padded
with zero bits to whole bytes:

    code b        Rice code, divisor 2^b: unary quotients, b planes of remainder bits, signs (1 is minus)
    code 64 + b   Golomb code, divisor 3 * 2^b: unary quotients, "third > 0", "third = 2" where it is > 0,
                  b planes of remainder bits, signs
    code 255      DEFLATE of the bitmap of nonzeros, signs

Fields of one kind lie together, so that whole arrays are coded at once. Bits count from the highest of a
byte, planes from the lowest bit of the remainder. A gap is how many zeros precede a nonzero; zeros after the
last nonzero are implied. A quotient q is q zero bits and a one.

The divisor 2^b and the size formula are those of Sattler et al., "Robust and Communication-Efficient
Federated Learning from Non-IID Data" (IEEE TNNLS 31(9), 2020), which ComPEFT (arXiv 2311.13171) counts with.
The other two codes are for densities where a power of two is up to 3 % above the entropy.

Kept although written by hand, for densities under 5 %, which ratios above 50 call for: a deflated bitmap
takes a third more at 2 % and below, 4 % more at 5 %, no more from 10 % on. Files of format 2 hold them.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from soppu.compress.codec import streams
from soppu.errors import AdapterError, BundleError, ConfigError

Signs = NDArray[np.int8]
_Places = NDArray[np.int64]

_COUNT = struct.Struct("<Q")
_HEAD = struct.Struct("<BII")
_BLOCK = 1 << 20  # values coded together: they and their places stay in the cache
_THIRDS = 64
_MASK = 255
_MOST_BITS = 20  # of a remainder: no gap is longer than a block
_DENSE = 1 / 3  # from here on the gaps are too short for any divisor to fit them
_LOG_RATIO = -math.log((math.sqrt(5) - 1) / 2)


def bits_per_value(density: float) -> float:
    """The published size: p (1 + b + 1 / (1 - (1 - p)^(2^b))) bits a value, b as in Sattler et al. (2020).

    Raises:
        ConfigError: a density outside 0 to 1.
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"a density of {density!r}, allowed: 0 to 1")
    p = float(density)
    return p * (1 + _bits_per_gap(p, _rice(p))) if p else 0.0


def encode(values: Signs) -> bytes:
    """The bytes of a ternary array, flattened. O(size).

    Args:
        values: int8 of any shape, nothing but -1, 0 and 1.

    Raises:
        AdapterError: another type, or another value.
    """
    if values.dtype != np.int8:
        raise AdapterError(f"ternary numbers of type {values.dtype}, expected int8")
    flat = np.ascontiguousarray(values).reshape(-1)
    blocks = [flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK)]
    return b"".join([_COUNT.pack(flat.size), *(part for block in blocks for part in _encode(block))])


def decode(data: bytes | memoryview, *, size: int, source: str) -> Signs:
    """The `size` values that `encode` coded, (size,) int8. O(size).

    Safe on any bytes: nothing is made that `size` and the length of `data` do not call for.

    Raises:
        BundleError: the stream is damaged, or does not hold exactly `size` values; `source` is named.
    """
    reader = _Reader(data, source)
    (count,) = _COUNT.unpack(reader.take(_COUNT.size))
    if count != size:
        raise BundleError(f"{source}: {count} ternary numbers, expected {size}")
    if -(-size // _BLOCK) * _HEAD.size > reader.left:
        raise BundleError(f"{source}: {reader.left} bytes cannot hold {size} ternary numbers")
    made = np.zeros(size, np.int8)
    for start in range(0, size, _BLOCK):
        _decode(reader, made[start : start + _BLOCK])
    if reader.left:
        raise BundleError(f"{source}: {reader.left} bytes after the last ternary number")
    return made


def _encode(block: Signs) -> list[bytes]:
    if ((block.view(np.uint8) + np.uint8(1)) > 2).any():
        strange = block[(block < -1) | (block > 1)][0]
        raise AdapterError(f"a ternary number is {strange}, allowed: -1, 0, 1")
    nonzero = block != 0
    at = np.flatnonzero(nonzero)
    if not at.size:
        return [_HEAD.pack(0, 0, 0)]
    code = _best(at.size / block.size)
    rest: list[bytes] = []
    if code == _MASK:
        first = streams.deflate(_pack(nonzero), huffman=at.size < block.size)
    elif code == 0:  # a gap of g zeros is g zero bits and a one: the bitmap itself
        first = _pack(nonzero[: at[-1] + 1])
    else:
        first, rest = _encode_gaps(at.astype(np.int32), code)
    return [_HEAD.pack(code, at.size, len(first)), first, *rest, _pack(block[at] < 0)]


def _encode_gaps(at: NDArray[np.int32], code: int) -> tuple[bytes, list[bytes]]:
    """The unary field of a block, and its other fields but the signs."""
    gaps = at.copy()
    gaps[1:] -= at[:-1] + np.int32(1)
    bits, rest = code % _THIRDS, []
    quotient = gaps >> bits
    if code >= _THIRDS:
        whole = quotient // np.int32(3)
        third = (quotient - 3 * whole).astype(np.uint8)
        rest, quotient = [_pack(third > 0), _pack(third[np.flatnonzero(third > 0)] > 1)], whole
    ends = np.cumsum(quotient + np.int32(1), dtype=np.int64)
    unary = np.zeros(ends[-1], np.bool_)
    unary[ends - 1] = True
    return _pack(unary), [*rest, *(_pack(gaps & np.int32(1 << bit) != 0) for bit in range(bits))]


def _decode(reader: _Reader, block: Signs) -> None:
    """Fill a block of zeros from the stream."""
    code, count, length = _HEAD.unpack(reader.take(_HEAD.size))
    known = code == _MASK or code % _THIRDS <= _MOST_BITS and code < 2 * _THIRDS
    if not known or count > block.size or bool(count) != bool(length):
        raise BundleError(f"{reader.source}: a block of {count} nonzeros in code {code} and {length} bytes")
    if not count:
        return
    if code == _MASK:
        bitmap = streams.inflate(bytes(reader.take(length)), size=-(-block.size // 8), source=reader.source)
        at = _ones(bitmap)
    else:
        at = _places(reader, code, count, length, block.size)
    if at.size != count or at[-1] >= block.size:
        raise BundleError(f"{reader.source}: nonzeros are not the {count} in {block.size} numbers announced")
    block[at] = np.int8(1) - 2 * reader.bits(count).view(np.int8)


def _ones(field: bytes | memoryview) -> _Places:
    return np.flatnonzero(np.unpackbits(np.frombuffer(field, np.uint8)).view(np.bool_))


def _places(reader: _Reader, code: int, count: int, length: int, size: int) -> _Places:
    """The places of nonzeros from the gaps between them; beyond `size` where the stream is damaged."""
    bits, thirds = code % _THIRDS, code >= _THIRDS
    divisor = (3 if thirds else 1) << bits
    if length > (size // divisor + count + 7) // 8:
        raise BundleError(f"{reader.source}: {length} bytes of quotients for {count} nonzeros in {size}")
    ends = _ones(reader.take(length))
    if ends.size != count or ends[-1] < 8 * length - 8:
        raise BundleError(f"{reader.source}: {ends.size} quotients in {length} bytes, {count} announced")
    if code == 0:
        return ends
    gaps = np.diff(ends, prepend=-1) - 1
    if thirds:
        gaps *= 3
        more = np.flatnonzero(reader.bits(count).view(np.bool_))
        gaps[more] += 1 + reader.bits(more.size)
    gaps <<= bits
    for bit in range(bits):
        gaps += reader.bits(count).astype(np.int64) << bit
    return np.cumsum(gaps + 1) - 1


class _Reader:
    """Bytes taken off the front of a stream, never more than there are."""

    def __init__(self, data: bytes | memoryview, source: str) -> None:
        self.source = source
        self._data = memoryview(data).cast("B")

    @property
    def left(self) -> int:
        return len(self._data)

    def take(self, count: int) -> memoryview:
        if count > len(self._data):
            raise BundleError(f"{self.source}: ternary numbers end {count - len(self._data)} bytes early")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def bits(self, count: int) -> NDArray[np.uint8]:
        """The `count` bits of a field as 0 and 1."""
        field = np.frombuffer(self.take(-(-count // 8)), np.uint8)
        if count % 8 and field[-1] & (0xFF >> count % 8):
            raise BundleError(f"{self.source}: bits beyond the {count} of a field")
        return np.unpackbits(field, count=count)


def _pack(bits: NDArray[np.bool_]) -> bytes:
    return np.packbits(bits).tobytes()


def _rice(p: float) -> int:
    """The b of max(0, 1 + floor(log2(log(phi - 1) / log(1 - p)))), phi the golden ratio; for p > 0."""
    ratio = _LOG_RATIO / -math.log1p(-p) if p < 1 else 0.0
    return min(_MOST_BITS, max(0, 1 + math.floor(math.log2(ratio)))) if ratio else 0


def _best(p: float) -> int:
    """The code with the fewest bits for a share p of nonzeros at random places."""
    if p > _DENSE:
        return _MASK
    bits = _rice(p)
    return min(
        (bits, *(_THIRDS + b for b in (bits - 1, bits - 2) if b >= 0)),
        key=lambda code: _bits_per_gap(p, code),
    )


def _bits_per_gap(p: float, code: int) -> float:
    """Expected bits of a geometric gap. A third costs 1 bit where it is 0, otherwise 2."""
    bits = code % _THIRDS
    if code < _THIRDS:
        return bits + 1 / _ends_within(p, 1 << bits)
    whole, first = _ends_within(p, 3 << bits), _ends_within(p, 1 << bits)
    return bits + 1 / whole + 2 - first / whole


def _ends_within(p: float, length: int) -> float:
    """1 - (1 - p)^length: the probability of a gap shorter than `length`."""
    return -math.expm1(length * math.log1p(-p)) if p < 1 else 1.0
