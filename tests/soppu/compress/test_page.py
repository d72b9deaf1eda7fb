from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.compress.codec import golomb, page, streams
from soppu.compress.codec.page import ModuleShape
from soppu.compress.numbers.components import Components, concatenate
from soppu.compress.numbers.quantise import AXIS, TERNARY
from soppu.errors import BundleError
from tests.soppu.compress.handmade import Form, components

COORDS = (4, 6, 8, 16, 32)
OWN = (TERNARY, 2, 3, 4, 5, 6, 8, 16, 32)
FIELDS = ("coords_width", "own_width", "axis", "coords", "own", "beta")


def same(one: Components, other: Components) -> bool:
    pairs = [(one.user, other.user), (one.gain, other.gain)]
    pairs += [
        (getattr(s, f), getattr(t, f)) for s, t in zip(sides(one), sides(other), strict=True) for f in FIELDS
    ]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def sides(part: Components) -> tuple[Any, Any]:
    return part.left, part.right


@st.composite
def a_side(draw: Any, k: int, place: int) -> tuple[int, int]:
    coords = draw(st.sampled_from((0, *COORDS, *((AXIS,) if place < k else ())) if k else (0,)))
    return coords, draw(st.sampled_from((0, *OWN) if coords else OWN))


@st.composite
def a_page(draw: Any) -> tuple[list[ModuleShape], list[Components], int]:
    """Shapes, components and users of a page: any form of component that can be."""
    users, shapes, parts = draw(st.integers(1, 4)), [], []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 3))):
        o, i = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        k = draw(st.integers(0, min(o, 3))), draw(st.integers(0, min(i, 3)))
        forms: list[list[Form]] = [
            [
                draw(a_side(k[0], place)) + draw(a_side(k[1], place))
                for place in range(draw(st.integers(0, 4)))
            ]
            for _ in range(users)
        ]
        shapes.append(ModuleShape(o, i, *k))
        parts.append(components(forms, (o, i), k, generator))
    return shapes, parts, users


class Plain:
    """A page read number by number, as docs/format.md tells it: what a reader in another language does."""

    COORDS = (0, 1, 4, 6, 8, 16, 32)
    OWN = (0, 1, 2, 3, 4, 5, 6, 8, 16, 32)
    LIMITS = {("coords", 4): 7, ("coords", 6): 31, ("own", 1): 1, ("own", 2): 2, ("own", 3): 7}

    def __init__(self, data: bytes, shapes: list[ModuleShape], users: int) -> None:
        sizes = struct.unpack_from("<18I", data)
        ends = np.cumsum((72, *sizes)).tolist()
        parts = [data[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
        assert ends[-1] == len(data)
        counts = struct.unpack(f"<{len(shapes) * users}H", zlib.decompress(parts[0], -15))
        kinds = zlib.decompress(parts[1], -15) if parts[1] else b""
        self.gains = struct.unpack(
            f"<{sum(counts)}{'f' if len(parts[2]) == 2 * len(kinds) else 'e'}", parts[2]
        )
        self.betas = list(struct.unpack(f"<{len(parts[3]) // 2}e", parts[3]))
        keys = [("coords", w) for w in self.COORDS[2:]] + [("own", w) for w in self.OWN[1:]]
        self.numbers = {key: self.unpacked(part, key) for key, part in zip(keys, parts[4:], strict=True)}
        self.components = []  # (module, user, output side, input side), a side as (coordinates, own, beta)
        modes = zip(kinds[::2], kinds[1::2], strict=True)
        for m, shape in enumerate(shapes):
            here = [(n, j, next(modes)) for n in range(users) for j in range(counts[m * users + n])]
            out = [self.side(mode[0], j, shape.out, shape.k_out) for _, j, mode in here]
            inn = [self.side(mode[1], j, shape.inn, shape.k_in) for _, j, mode in here]
            self.components += [(m, n, o, i) for (n, _, _), o, i in zip(here, out, inn, strict=True)]
        left = {key: rest for key, rest in self.numbers.items() if rest}
        assert not self.betas and not any(map(any, left.values())), (
            left
        )  # what is left fills a group, with zeros

    def unpacked(self, data: bytes, key: tuple[str, int]) -> list[float]:
        if key[1] in (16, 32):
            return list(struct.unpack(f"<{8 * len(data) // key[1]}{'e' if key[1] == 16 else 'f'}", data))
        if key == ("own", 1):
            size = int.from_bytes(data[:8], "little")
            return golomb.decode(data, size=size, source="x").astype(float).tolist() if data else []
        limit = self.LIMITS.get(key, 127)
        group, base = {2: 3, 7: 2}.get(limit, 1), 2 * limit + 1
        raw = zlib.decompress(data, -15) if data else b""
        digits = [byte // base**place % base - limit for byte in raw for place in reversed(range(group))]
        return [digit / (limit if key[0] == "coords" else 1) for digit in digits]

    def side(self, mode: int, place: int, d: int, k: int) -> tuple[list[float], list[float], float]:
        coords_width, own_width = self.COORDS[mode >> 4], self.OWN[mode & 15]
        coords = self.take("coords", coords_width, k) if coords_width > 1 else [0.0] * k
        if coords_width == 1:
            coords[place] = 1.0
        beta = self.betas.pop(0) if coords_width and own_width else float(own_width > 0)
        return coords, self.take("own", own_width, d) if own_width else [], beta

    def take(self, field: str, width: int, count: int) -> list[float]:
        held = self.numbers[field, width]
        taken, held[:count] = held[:count], []
        assert len(taken) == count
        return taken


@settings(max_examples=80)
@given(a_page())
def test_decode_inverts_encode(made):
    shapes, parts, users = made
    data = page.encode(parts, users=users)
    again = page.decode(data, shapes, users=users, first=0, source="x")
    assert all(same(one, other) for one, other in zip(parts, again, strict=True))
    assert page.encode(again, users=users) == data


@settings(max_examples=60)
@given(a_page())
def test_a_plain_reader_finds_the_same_numbers(made):
    shapes, parts, users = made
    plain = Plain(page.encode(parts, users=users), shapes, users)
    assert plain.gains == pytest.approx(torch.cat([part.gain for part in parts]).tolist(), abs=0)
    found = iter(plain.components)
    for m, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
        dense = [
            (side, side.coordinates(k), iter(side.own))
            for side, k in zip(sides(part), ks(shape), strict=True)
        ]
        for place, user in enumerate(part.user.tolist()):
            module, who, *both = next(found)
            assert (module, who) == (m, user)
            for (coords, own, beta), (side, expected, rows) in zip(both, dense, strict=True):
                assert torch.equal(torch.tensor(coords), expected[place]) and beta == float(side.beta[place])
                assert not own or torch.equal(torch.tensor(own), next(rows))
    assert next(found, None) is None


@settings(max_examples=30)
@given(a_page(), st.integers(0, 1000))
def test_users_are_numbered_from_the_first_of_the_page(made, first):
    shapes, parts, users = made
    again = page.decode(page.encode(parts, users=users), shapes, users=users, first=first, source="x")
    for part, other in zip(parts, again, strict=True):
        assert torch.equal(part.user + first, other.user)


@settings(max_examples=100)
@given(a_page(), st.data())
def test_changed_bytes_give_components_that_fit_or_an_error(made, data):
    shapes, parts, users = made
    held = bytearray(page.encode(parts, users=users))
    for _ in range(data.draw(st.integers(1, 3))):
        held[data.draw(st.integers(0, len(held) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(held), shapes, users)


@settings(max_examples=100)
@given(a_page(), st.data())
def test_changed_streams_give_components_that_fit_or_an_error(made, data):
    shapes, parts, users = made
    split = streams.split(page.encode(parts, users=users), count=18, source="x")
    place = data.draw(st.integers(0, 17))
    split[place] = data.draw(st.one_of(st.binary(max_size=30), st.binary(max_size=30).map(streams.deflate)))
    check(streams.join(split), shapes, users)


def check(data: bytes, shapes: list[ModuleShape], users: int) -> None:
    try:
        parts = page.decode(data, shapes, users=users, first=0, source="x")
    except BundleError as error:
        assert str(error).startswith("x: ")
        return
    for shape, part in zip(shapes, parts, strict=True):
        assert part.user.tolist() == sorted(part.user.tolist()) and len(part) == len(part.gain)
        for side, k, d in zip(sides(part), ks(shape), (shape.out, shape.inn), strict=True):
            assert side.vectors(torch.ones(d, k) if k else None).shape == (len(part), d)
            assert bool(torch.isfinite(side.coords).all() and torch.isfinite(side.own).all())


def ks(shape: ModuleShape) -> tuple[int, int]:
    return shape.k_out, shape.k_in


SHAPE = ModuleShape(5, 4, 2, 0)


def small(form: Form = (8, 0, 0, 3), count: int = 2) -> Components:
    return components([[form] * count], (5, 4), (2, 0), torch.Generator().manual_seed(0))


def altered(place: int, part: bytes, form: Form = (8, 0, 0, 3)) -> bytes:
    """The page of two components with one of its streams replaced."""
    split = streams.split(page.encode([small(form)], users=1), count=18, source="x")
    split[place] = part
    return streams.join(split)


@pytest.mark.parametrize(
    ("place", "part", "words"),
    [
        (0, streams.deflate(b"\2\0\0\0"), "not of 2 bytes"),
        (0, streams.deflate(b"\3\0"), "4 bytes for the gains of 3 components"),
        (0, streams.deflate(b"\0\0"), "4 bytes for the gains of 0 components"),
        (1, streams.deflate(b"\x40\3"), "not of 4 bytes"),
        (1, streams.deflate(b"\x40\3\x40\0"), "which does not exist"),
        (1, streams.deflate(b"\x40\3\x70\3"), "which does not exist"),
        (1, streams.deflate(b"\x40\3\x40\x0a"), "which does not exist"),
        (1, streams.deflate(b"\x40\3\x40\x40"), "coordinates at a module without a basis"),
        (1, streams.deflate(b"\x50\3\x40\3"), "4 bytes for 2 floats of 32 bits"),
        (2, b"\0\x3c\0\x7e", "NaN"),
        (2, b"\0\x3c", "2 bytes for the gains of 2"),
        (3, b"\0\x3c", "2 bytes for 0 floats"),
        (4, streams.pack(np.zeros(4, np.int8), 7), "a stream of"),
        (6, streams.pack(np.zeros(3, np.int8), 127), "not of 4 bytes"),
        (11, b"", "4 bytes announced, a stream of 0"),
    ],
)
def test_what_no_writer_makes_is_refused(place, part, words):
    with pytest.raises(BundleError) as caught:
        page.decode(altered(place, part), [SHAPE], users=1, first=0, source="x")
    assert str(caught.value).startswith("x: ") and words in str(caught.value)


def test_an_axis_beyond_the_rank_is_refused():
    data = page.encode([small((AXIS, 0, 0, 3), 2)], users=1)
    with pytest.raises(BundleError, match="coordinate 1 in a basis of rank 1"):
        page.decode(data, [replace(SHAPE, k_out=1)], users=1, first=0, source="x")


def test_the_writer_refuses_what_the_streams_leave_out():
    part = small((AXIS, 0, 0, 3))
    moved = replace(part, left=replace(part.left, axis=part.left.axis.flip(0)))
    with pytest.raises(BundleError, match="axis that is not the place"):
        page.encode([moved], users=1)
    with pytest.raises(BundleError, match="order of their users"):
        page.encode([replace(part, user=torch.tensor([1, 0]))], users=2)
    with pytest.raises(BundleError, match="numbers of 7 bits"):
        odd = part.right.own_width + torch.tensor(4, dtype=torch.uint8)
        page.encode([replace(part, right=replace(part.right, own_width=odd))], users=1)
    with pytest.raises(BundleError, match="allowed: -7 to 7"):
        page.encode([replace(part, right=replace(part.right, own=part.right.own + 20))], users=1)
    with pytest.raises(BundleError, match="65504"):
        page.encode([replace(part, gain=part.gain * 1e9)], users=1)


def test_more_components_than_a_count_holds_are_refused():
    many = concatenate([small((8, 0, 0, 3), 1)] * 65_536)
    with pytest.raises(BundleError, match="65536 components"):
        page.encode([many], users=1)


def test_a_page_of_nobody_has_its_lengths_and_nothing_else():
    data = page.encode([small(count=0)], users=3)
    assert len(data) <= 72 + 8
    (part,) = page.decode(data, [SHAPE], users=3, first=0, source="x")
    assert len(part) == 0 and part.left.own.shape == (0, 5)


def announced(**changes: Any) -> int:
    """Bytes taken to refuse a page of 4 components of 100,000 bytes, of sizes it cannot have."""
    split = streams.split(page.encode([small((0, TERNARY, 0, 3), 4)], users=1), count=18, source="x")
    for place, part in changes.pop("parts", {}).items():
        split[place] = part
    split[-1] = bytes(100_000)
    tracemalloc.start()
    with pytest.raises(BundleError):
        page.decode(streams.join(split), [replace(SHAPE, **changes)], users=1, first=0, source="x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_hostile_sizes_make_no_room():
    zeros = struct.pack("<Q", 1 << 26) + struct.pack("<BII", 0, 0, 0) * 64
    assert announced(out=1 << 24) < 10 << 20
    assert announced(out=1 << 24, parts={9: zeros}) < 10 << 20
    assert announced(inn=1 << 24) < 10 << 20
    bomb = streams.deflate(bytes(1 << 24))
    assert announced(inn=1 << 22, parts={11: bomb}) < 10 << 20
    assert announced(parts={0: streams.deflate(b"\xff\xff"), 1: bomb}) < 10 << 20


def test_ternary_numbers_that_are_nearly_all_zeros_are_refused_by_the_writer():
    form, generator = (0, TERNARY, 0, 3), torch.Generator().manual_seed(0)
    part = components([[form]], (1 << 21, 4), (0, 0), generator)
    sparse = torch.zeros_like(part.left.own)
    sparse[0, 0] = 1
    with pytest.raises(BundleError, match="too few of them are not 0"):
        page.encode([replace(part, left=replace(part.left, own=sparse))], users=1)


@given(drawn=a_page(), most=st.integers(1, 60), again=st.integers(1, 4))
def test_a_writer_cuts_what_it_is_given_into_pages_of_its_size(
    drawn: tuple[list[ModuleShape], list[Components], int], most: int, again: int
) -> None:
    shapes, parts, users = drawn
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "_PAGE_NUMBERS", most)
        writer = page.PageWriter()
        for _ in range(again):
            writer.add(parts, users=users)
        pages = writer.close()
    assert [one.first for one in pages] == [sum(p.users for p in pages[:n]) for n in range(len(pages))]
    assert sum(one.users for one in pages) == again * users
    assert writer.numbers == again * sum(page.numbers(part) + len(part) for part in parts)
    read = [page.decode(p.data, shapes, users=p.users, first=p.first, source="page") for p in pages]
    shifts = [torch.arange(users) + users * number for number in range(again)]
    wanted = page.decode(page.encode(parts, users=users), shapes, users=users, first=0, source="whole")
    for column, part in zip(zip(*read, strict=True), wanted, strict=True):
        assert same(concatenate(list(column)), concatenate([part.renumbered(one) for one in shifts]))
    each = [sum(page.numbers(part.select(part.user == user)) for part in parts) for user in range(users)]
    held = [sum(page.numbers(part) for part in one) for one in read]
    assert all(size < most + max(each) for size in held) and all(size >= most for size in held[:-1])
