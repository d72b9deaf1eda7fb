"""The ternary bitstream: an exact inverse, as small as published or smaller, and safe on any bytes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from soppu.compress.codec import golomb
from soppu.errors import AdapterError, BundleError, ConfigError
from tests.soppu.compress import ternary_measures as measures

PUBLISHED = {0.01: 0.0911, 0.02: 0.162, 0.05: 0.339, 0.1: 0.576, 0.2: 0.939, 0.3: 1.188, 0.5: 1.5}
BLOCK = 1 << 20
HEAD = 9


def draw(size: int, density: float, *, seed: int = 0) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    signs = 1 - 2 * rng.integers(0, 2, size, dtype=np.int8)
    return np.where(rng.random(size) < density, signs, 0).astype(np.int8)


def coded(values: NDArray[np.int8], *, rice: bool) -> bytes:
    return measures.rice(values) if rice else golomb.encode(values)


def back(values: NDArray[np.int8], *, rice: bool = False) -> NDArray[np.int8]:
    return golomb.decode(coded(values, rice=rice), size=values.size, source="test")


def plain(values: NDArray[np.int8], b: int) -> int:
    """Bits of a Rice code, one number after the other, without padding."""
    bits = gap = 0
    for value in values:
        if value == 0:
            gap += 1
        else:
            bits += (gap >> b) + 1 + b + 1
            gap = 0
    return bits


def harmless(data: bytes, size: int) -> None:
    """Decoding gives an array of the right size and values, or BundleError."""
    try:
        made = golomb.decode(data, size=size, source="a hostile file")
    except BundleError as error:
        assert "a hostile file" in str(error)
    else:
        assert made.dtype == np.int8 and made.shape == (size,)
        assert np.isin(made, (-1, 0, 1)).all()


@given(
    values=st.lists(st.sampled_from([-1, 0, 1]), max_size=300),
    zeros=st.integers(0, 3000),
    rice=st.booleans(),
)
def test_decoding_is_the_inverse(values: list[int], zeros: int, rice: bool) -> None:
    flat = np.array([*values, *[0] * zeros, *values[:7]], np.int8)
    np.testing.assert_array_equal(back(flat, rice=rice), flat)


@settings(max_examples=60)
@given(size=st.integers(1, 40_000), density=st.floats(0, 1), rice=st.booleans(), seed=st.integers(0, 10))
def test_decoding_is_the_inverse_at_any_density(size: int, density: float, rice: bool, seed: int) -> None:
    values = draw(size, density**3, seed=seed)
    np.testing.assert_array_equal(back(values, rice=rice), values)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("density", [1e-6, 0.003, 0.1, 0.6])
def test_the_borders_of_blocks(size: int, density: float) -> None:
    values = draw(size, density)
    values[[0, -1]] = 1, -1
    np.testing.assert_array_equal(back(values), values)


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, BLOCK + 8])
def test_constant_arrays(value: int, size: int) -> None:
    values = np.full(size, value, np.int8)
    np.testing.assert_array_equal(back(values), values)


def test_one_nonzero_at_the_end_of_a_block() -> None:
    values = np.zeros(BLOCK, np.int8)
    values[-1] = -1
    data = golomb.encode(values)
    assert len(data) < 40
    np.testing.assert_array_equal(golomb.decode(data, size=BLOCK, source="test"), values)


def test_shape_and_memory_order_do_not_matter() -> None:
    grid = draw(600, 0.3).reshape(20, 30)
    assert golomb.encode(grid) == golomb.encode(grid.reshape(-1))
    assert golomb.encode(grid.T) == golomb.encode(np.ascontiguousarray(grid.T))
    wide = golomb.decode(memoryview(golomb.encode(grid[:, ::2])), size=300, source="test")
    np.testing.assert_array_equal(wide.reshape(20, 15), grid[:, ::2])


@pytest.mark.parametrize("density", PUBLISHED)
def test_published_bits_are_the_formula(density: float) -> None:
    digits = 4 if density == 0.01 else 3
    assert round(golomb.bits_per_value(density), digits) == PUBLISHED[density]


@pytest.mark.parametrize("density", PUBLISHED)
def test_the_published_code_takes_what_the_formula_says(density: float) -> None:
    values = draw(3 * BLOCK, density)
    bits = 8 * len(measures.rice(values)) / values.size
    assert bits == pytest.approx(golomb.bits_per_value(np.count_nonzero(values) / values.size), rel=2e-3)


@pytest.mark.parametrize(("density", "b"), [(0.01, 6), (0.05, 4), (0.1, 3), (0.3, 1), (0.5, 0)])
def test_the_published_code_takes_as_many_bits_as_a_plain_one(density: float, b: int) -> None:
    values = draw(20_000, density)
    data = measures.rice(values)
    assert data[8] == b
    padding = 8 * (b + 2)
    assert 0 <= 8 * (len(data) - 8 - HEAD) - plain(values, b) < padding


@pytest.mark.parametrize(
    "density", [0.002, 0.01, 0.05, 0.1, 0.12, 0.2, 0.25, 0.33, 0.38, 0.45, 0.5, 0.6, 0.9]
)
def test_a_stream_is_within_two_percent_of_the_entropy(density: float) -> None:
    values = draw(2 * BLOCK, density)
    bits = 8 * len(golomb.encode(values)) / values.size
    assert bits < 1.02 * measures.entropy(np.count_nonzero(values) / values.size)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.3, 0.38, 0.7, 1.0])
def test_no_code_is_larger_than_the_published_one(density: float) -> None:
    values = draw(BLOCK, density)
    assert len(golomb.encode(values)) <= len(measures.rice(values))


def test_blocks_follow_the_density() -> None:
    """An adapter whose A passes a threshold and whose B does not takes no bits for B."""
    uneven = np.concatenate([draw(BLOCK, 0.4), np.zeros(BLOCK, np.int8)])
    assert 8 * len(golomb.encode(uneven)) / uneven.size < 0.8 * measures.entropy(0.2)


def test_entropy_and_formula_at_their_ends() -> None:
    assert measures.entropy(0) == golomb.bits_per_value(0) == 0
    assert measures.entropy(1) == 1
    assert golomb.bits_per_value(1) == 2
    assert measures.entropy(0.5) == golomb.bits_per_value(0.5) == pytest.approx(1.5)
    assert golomb.bits_per_value(1e-12) > measures.entropy(1e-12) > 0


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf])
def test_a_density_that_is_none(density: float) -> None:
    for function in (measures.entropy, golomb.bits_per_value):
        with pytest.raises(ConfigError, match="0 to 1"):
            function(density)


@pytest.mark.parametrize("value", [-128, -2, 2, 3, 127])
def test_other_numbers_are_refused(value: int) -> None:
    values = draw(1000, 0.5)
    values[777] = value
    with pytest.raises(AdapterError, match=str(value)):
        golomb.encode(values)


@pytest.mark.parametrize("kind", [np.float32, np.int16, np.uint8, np.bool_])
def test_other_types_are_refused(kind: type) -> None:
    with pytest.raises(AdapterError, match=np.dtype(kind).name):
        golomb.encode(np.zeros(3, kind))


@settings(max_examples=300)
@given(data=st.binary(max_size=200), size=st.integers(0, 5000))
def test_random_bytes_do_no_harm(data: bytes, size: int) -> None:
    harmless(data, size)
    harmless(struct.pack("<Q", size) + data, size)


@settings(max_examples=500)
@given(
    size=st.integers(1, 3000),
    code=st.sampled_from([0, 1, 3, 20, 21, 63, 64, 66, 84, 85, 127, 128, 254, 255]),
    count=st.integers(0, 4000),
    length=st.integers(0, 60),
    body=st.binary(max_size=300),
)
def test_hostile_headers_do_no_harm(size: int, code: int, count: int, length: int, body: bytes) -> None:
    harmless(struct.pack("<QBII", size, code, count, length) + body, size)


@pytest.mark.parametrize("density", [0.01, 0.08, 0.11, 0.2, 0.5])
@pytest.mark.parametrize("rice", [False, True])
def test_every_truncation_is_an_error(density: float, rice: bool) -> None:
    data = coded(draw(2000, density), rice=rice)
    for length in range(len(data)):
        with pytest.raises(BundleError):
            golomb.decode(data[:length], size=2000, source="test")


@pytest.mark.parametrize("density", [0.01, 0.11, 0.2, 0.5])
@pytest.mark.parametrize("rice", [False, True])
def test_every_flipped_bit_does_no_harm(density: float, rice: bool) -> None:
    values = draw(700, density)
    data = coded(values, rice=rice)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        harmless(bytes(damaged), values.size)


@pytest.mark.parametrize("size", [0, 1, 999, 1001, 1 << 40])
def test_another_size_is_an_error(size: int) -> None:
    with pytest.raises(BundleError, match=r"1000 ternary numbers, expected"):
        golomb.decode(golomb.encode(draw(1000, 0.1)), size=size, source="test")


def test_bytes_after_the_end_are_an_error() -> None:
    with pytest.raises(BundleError, match="1 bytes after"):
        golomb.decode(golomb.encode(draw(1000, 0.1)) + b"\0", size=1000, source="test")


def test_a_size_the_bytes_cannot_hold_makes_no_room() -> None:
    """2^50 values would not fit any memory: they are refused before they are asked for."""
    with pytest.raises(BundleError, match="cannot hold"):
        golomb.decode(struct.pack("<Q", 1 << 50) + bytes(900), size=1 << 50, source="test")


def test_a_bitmap_that_inflates_without_end_is_stopped() -> None:
    bomb = golomb.streams.deflate(b"\xff" * 1_000_000)
    data = struct.pack("<QBII", 800, 255, 800, len(bomb)) + bomb + bytes(100)
    with pytest.raises(BundleError):
        golomb.decode(data, size=800, source="test")


def test_a_bitmap_of_zeros_that_announces_nonzeros_is_an_error() -> None:
    bitmap = golomb.streams.deflate(bytes(100))
    data = struct.pack("<QBII", 800, 255, 3, len(bitmap)) + bitmap + bytes(1)
    with pytest.raises(BundleError, match="not the 3"):
        golomb.decode(data, size=800, source="test")


def test_bits_beyond_the_last_sign_are_an_error() -> None:
    data = bytearray(golomb.encode(np.array([0, 1, 0, 0, 0, 0, 0, 0, 0], np.int8)))
    data[-1] |= 1
    with pytest.raises(BundleError, match="beyond"):
        golomb.decode(bytes(data), size=9, source="test")
