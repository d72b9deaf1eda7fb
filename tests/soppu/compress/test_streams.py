from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from soppu.compress.codec import streams
from soppu.errors import BundleError

LIMITS = (1, 2, 7, 31, 127)


def plain(data: bytes, count: int, limit: int) -> list[int]:
    """The integers of a stream, one after the other, as docs/format.md tells it."""
    group, base = {2: 3, 7: 2}.get(limit, 1), 2 * limit + 1
    made = []
    for byte in zlib.decompress(data, -15) if data else b"":
        made += [byte // base**place % base - limit for place in reversed(range(group))]
    return made[:count]


@given(st.sampled_from(LIMITS), st.data())
def test_unpack_inverts_pack_and_agrees_with_a_plain_reader(limit, data):
    values = data.draw(arrays.arrays(np.int8, st.integers(0, 300), elements=st.integers(-limit, limit)))
    packed = streams.pack(values, limit)
    assert np.array_equal(streams.unpack(packed, count=len(values), limit=limit, source="x"), values)
    assert plain(packed, len(values), limit) == values.tolist()


@given(st.sampled_from((16, 32)), st.data())
def test_floats_come_back_as_they_went_in(width, data):
    number = st.floats(-65504, 65504, width=width)
    values = data.draw(arrays.arrays(np.float32, st.integers(0, 50), elements=number))
    packed = streams.pack_floats(values, width)
    assert len(packed) == len(values) * width // 8
    found = streams.unpack_floats(packed, count=len(values), width=width, source="x")
    assert np.array_equal(found, values)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=9))
def test_split_inverts_join(parts):
    assert streams.split(streams.join(parts), count=len(parts), source="x") == parts


def test_few_levels_take_less_than_their_bits():
    rng = np.random.default_rng(0)
    mostly_zero = (rng.integers(0, 20, 30_000) == 0).astype(np.int8)
    assert 8 * len(streams.pack(mostly_zero, 2)) < 0.6 * mostly_zero.size
    even = rng.integers(-2, 3, 30_000).astype(np.int8)
    assert 8 * len(streams.pack(even, 2)) < 2.45 * even.size  # log2(5) = 2.32


@pytest.mark.parametrize("values", [[3.0], [-3.0], [float("nan")], [300.0]])
def test_a_number_the_code_does_not_have_is_refused(values):
    with pytest.raises(BundleError, match="allowed: -2 to 2"):
        streams.pack(np.array(values, np.float32), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -65536.0])
@pytest.mark.parametrize("width", [16, 32])
def test_a_float_out_of_range_is_refused_by_writer_and_reader(value, width):
    with pytest.raises(BundleError, match="65504"):
        streams.pack_floats(np.array([value], np.float32), width)
    if width == 32 or not np.isfinite(value):
        raw = np.array([value], f"<f{width // 8}").tobytes()
        with pytest.raises(BundleError, match="x: NaN, or a float beyond 65504"):
            streams.unpack_floats(raw, count=1, width=width, source="x")


def test_another_number_of_integers_than_announced_is_refused():
    packed = streams.pack(np.ones(10, np.int8), 127)
    for count in (1, 9, 11, 1000):
        with pytest.raises(BundleError, match=r"^x: "):
            streams.unpack(packed, count=count, limit=127, source="x")
    with pytest.raises(BundleError, match="bytes for no numbers"):
        streams.unpack(packed, count=0, limit=127, source="x")


def test_a_byte_no_group_has_is_refused():
    for limit, byte in ((2, 125), (7, 225), (31, 63), (127, 255)):
        packed = streams.deflate(bytes([byte]), huffman=True)
        with pytest.raises(BundleError, match=f"byte {byte} in a stream"):
            streams.unpack(packed, count=1, limit=limit, source="x")


def test_a_stream_that_is_cut_goes_on_or_is_damaged_is_refused():
    packed = streams.deflate(b"hello hello hello", huffman=True)
    for bad in (packed[:-1], packed + b"\0", packed + packed, b"\xff" + packed, b"", packed[1:]):
        with pytest.raises(BundleError, match=r"^x: "):
            streams.inflate(bad, size=17, source="x")


def test_a_stream_that_unfolds_makes_no_more_room_than_its_size_explains():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(1 << 24)) + bomb.flush()
    assert len(packed) < 20_000
    tracemalloc.start()
    with pytest.raises(BundleError, match="cannot hold them"):
        streams.unpack(packed, count=1 << 24, limit=127, source="x")
    with pytest.raises(BundleError, match="cannot hold them"):
        streams.unpack(packed, count=10**18, limit=2, source="x")
    with pytest.raises(BundleError):
        streams.inflate(packed, size=1000, source="x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 17


@given(st.binary(max_size=200), st.integers(0, 600), st.sampled_from(LIMITS))
def test_any_bytes_give_numbers_in_range_or_an_error(data, count, limit):
    try:
        values = streams.unpack(data, count=count, limit=limit, source="x")
    except BundleError:
        return
    assert len(values) == count and (np.abs(values.astype(int)) <= limit).all()


@given(st.binary(max_size=60), st.integers(1, 9))
def test_split_gives_all_the_bytes_or_an_error(data, count):
    try:
        parts = streams.split(data, count=count, source="x")
    except BundleError:
        return
    assert streams.join(parts) == data


def test_split_refuses_lengths_that_do_not_add_up():
    for sizes in ((2, 3), (7, 0), ((1 << 32) - 1, (1 << 32) - 1)):
        with pytest.raises(BundleError, match="announced, 6 there"):
            streams.split(struct.pack("<2I", *sizes) + b"abcdef", count=2, source="x")
    with pytest.raises(BundleError, match="the lengths of 2 streams take 8"):
        streams.split(b"abcdef", count=2, source="x")
