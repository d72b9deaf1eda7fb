"""A page: the components of some consecutive users as bytes, and back.

Numbers of one width form one stream over the whole page: module by module, output side before input side,
component by component. docs/format.md describes the streams for readers in other languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from soppu.compress.codec import golomb, modes, streams
from soppu.compress.codec.basis import Bases
from soppu.compress.codec.modes import NUMBERS, Counts, Modes, SideModes
from soppu.compress.codec.streams import Floats
from soppu.compress.numbers.components import Components, Side, concatenate
from soppu.compress.numbers.quantise import AXIS, COORDS, FLOATS, QUANTISERS, TERNARY
from soppu.errors import BundleError

MOST_COMPONENTS = (1 << 16) - 1  # of a user at a module
_STREAMS = 4 + len(NUMBERS)
_LIMITS = {("coords", width): limit for width, limit in COORDS.items()}  # the largest integer of a stream
_LIMITS |= {("own", TERNARY): 1} | {("own", width): made.limit for width, made in QUANTISERS.items()}
_FREE_TERNARY = 1 << 20  # numbers of any stream; from there on it has to have bytes for them
_MOST_TERNARY = 512  # numbers for one byte
_PAGE_NUMBERS = 1 << 20  # a page is read as a whole: small enough for one user, large enough for its tables


@dataclass(frozen=True)
class Page:
    """The bytes of some consecutive users' components."""

    first: int
    users: int
    data: bytes


@dataclass(frozen=True)
class ModuleShape:
    """What a page has to know of a module: its features and the rank of its basis on each side, 0 = none."""

    out: int
    inn: int
    k_out: int
    k_in: int


def page_shapes(
    shapes: Mapping[str, tuple[int, int]], bases: Mapping[str, Sequence[Bases]]
) -> list[ModuleShape]:
    """What pages need to know of every module."""
    return [ModuleShape(o, i, bases[name][0][0].k, bases[name][0][1].k) for name, (o, i) in shapes.items()]


def encode(parts: Sequence[Components], *, users: int) -> bytes:
    """Bytes of a page: one entry of `parts` for every module, their users numbered 0 to users - 1. O(size).

    Gains and betas are rounded to the width they are kept in.

    Raises:
        BundleError: components that a page cannot hold.
    """
    sides = [side for part in parts for side in (part.left, part.right)]
    counts = np.stack([np.bincount(part.user.numpy(), minlength=users) for part in parts])
    for part, here in zip(parts, counts, strict=True):
        _check(part, here)
    codes = np.concatenate([modes.encode(part) for part in parts])
    gains = np.concatenate([part.gain.numpy() for part in parts])
    betas = np.concatenate([s.beta[(s.coords_width > 0) & (s.own_width > 0)].numpy() for s in sides])
    made = [
        streams.deflate(counts.astype("<u2").tobytes()),
        streams.deflate(codes.tobytes()),
        streams.pack_floats(gains, modes.gain_width(codes)),
        streams.pack_floats(betas, 16),
    ]
    for field, width in NUMBERS:
        rows = [_rows(side, field, width).reshape(-1) for side in sides]
        made.append(_pack(np.concatenate(rows), field, width))
    return streams.join(made)


def decode(
    data: bytes,
    shapes: Sequence[ModuleShape],
    *,
    users: int,
    first: int,
    source: str,
    only: int | None = None,
) -> list[Components]:
    """The components of a page, one entry for every module; users are numbered from `first` on. O(size).

    Args:
        only: the place of one user in the page, whose components alone are made: all of the page is
            inflated and held against its sizes, and a fraction of the time is needed.

    Raises:
        BundleError: the bytes are not a page of these users and modules.
    """
    reader = _Reader(data, source)
    counts = reader.counts(len(shapes), users)
    ends = np.cumsum(counts.sum(1))
    found, gains = reader.components(int(ends[-1]))
    codes = []
    for shape, here, part in zip(shapes, counts, np.split(found, ends[:-1]), strict=True):
        codes.append(SideModes(part[:, 0], here, features=shape.out, k=shape.k_out))
        codes.append(SideModes(part[:, 1], here, features=shape.inn, k=shape.k_in))
    for code in codes:
        code.check(source)
    asked = slice(None) if only is None else slice(only, only + 1)
    spans = [_span(here, asked) for here in counts]
    sides = reader.sides(codes, [span for span in spans for _ in range(2)])
    numbers = np.arange(first, first + users)[asked]
    return [
        Components(
            torch.from_numpy(np.repeat(numbers, here[asked])), torch.from_numpy(gain[span]), left, right
        )
        for here, gain, span, left, right in zip(
            counts, np.split(gains, ends[:-1]), spans, sides[::2], sides[1::2], strict=True
        )
    ]


@dataclass(frozen=True, eq=False)
class Survey:
    """What a page says of its users without its numbers, (modules, users) each."""

    counts: Counts  # components
    own: Counts  # of these, those with numbers of their own
    floats: Counts  # of these, those with floats among their own or their coordinates


def survey(data: bytes, *, modules: int, users: int, source: str) -> Survey:
    """How many components of which form everybody has. O(components). Raises BundleError."""
    reader = _Reader(data, source)
    counts = reader.counts(modules, users)
    found, _ = reader.components(int(counts.sum()))
    whose = np.repeat(np.arange(modules * users), counts.reshape(-1))

    def each(some: NDArray[np.bool_]) -> Counts:
        return np.bincount(whose[some], minlength=modules * users).reshape(modules, users)

    return Survey(counts, each(np.asarray((found & 15 > 0).any(1))), each(modes.floats(found)))


def _span(counts: Counts, asked: slice) -> slice:
    """Where the components of the users that are asked for lie among a module's."""
    begin = int(counts[: asked.start or 0].sum())
    return slice(begin, begin + int(counts[asked].sum()))


class _Reader:
    """The streams of one page. Each is held against the bytes it has before room is made for what it says."""

    def __init__(self, data: bytes, source: str) -> None:
        self.source = source
        self._parts = iter(streams.split(data, count=_STREAMS, source=source))

    def counts(self, modules: int, users: int) -> Counts:
        raw = streams.inflate(next(self._parts), size=2 * modules * users, source=self.source)
        return np.frombuffer(raw, "<u2").reshape(modules, users).astype(np.int64)

    def components(self, count: int) -> tuple[Modes, Floats]:
        """(count, 2) modes and (count,) gains; modes may be one byte for a thousand, so gains come first."""
        packed, gains = next(self._parts), next(self._parts)
        if len(gains) not in (2 * count, 4 * count):
            raise BundleError(f"{self.source}: {len(gains)} bytes for the gains of {count} components")
        raw = streams.inflate(packed, size=2 * count, source=self.source)
        found = np.frombuffer(raw, np.uint8).reshape(count, 2)
        modes.check(found, self.source)
        width = modes.gain_width(found)
        return found, streams.unpack_floats(gains, count=count, width=width, source=self.source)

    def sides(self, codes: Sequence[SideModes], spans: Sequence[slice]) -> list[Side]:
        """The sides of all modules, in order: of each the components in its span."""
        ends = np.cumsum([int(code.has_beta.sum()) for code in codes])
        flat = streams.unpack_floats(next(self._parts), count=int(ends[-1]), width=16, source=self.source)
        betas = np.split(flat, ends[:-1])
        pieces: list[dict[tuple[str, int], Floats]] = [{} for _ in codes]
        held: dict[tuple[str, int], list[tuple[int, int]]] = {numbers: [] for numbers in NUMBERS}
        for place, code in enumerate(codes):
            for numbers, size in code.sizes().items():
                held[numbers].append((place, size))
        for (field, width), wanted in held.items():
            total = sum(size for _, size in wanted)
            numbers_ = _Numbers(next(self._parts), total, field, width, self.source)
            at = 0
            for place, size in wanted:
                begin, end = codes[place].within(field, width, spans[place])
                pieces[place][field, width] = numbers_.take(at + begin, at + end)
                at += size
        return [_side(*one) for one in zip(codes, spans, pieces, betas, strict=True)]


def _side(code: SideModes, span: slice, pieces: dict[tuple[str, int], Floats], betas: Floats) -> Side:
    beta = (code.own_width > 0).astype(np.float32)
    beta[code.has_beta] = betas
    here = code.part(span)
    return Side(
        coords_width=torch.from_numpy(here.coords_width),
        own_width=torch.from_numpy(here.own_width),
        axis=torch.from_numpy(here.axis),
        coords=_joined(here, "coords", pieces),
        own=_joined(here, "own", pieces),
        beta=torch.from_numpy(beta[span]),
    )


def _joined(code: SideModes, field: str, pieces: dict[tuple[str, int], Floats]) -> torch.Tensor:
    """(components with numbers of this field, columns), from the numbers of every width."""
    widths, columns = code.widths(field), code.columns[field]
    made = np.zeros((len(widths), columns), np.float32)
    for (kind, width), piece in pieces.items():
        if kind == field:
            made[widths == width] = piece.reshape(-1, columns)
    return torch.from_numpy(made)


def _check(part: Components, counts: Counts) -> None:
    """What the streams leave out has to follow from what they hold. Raises BundleError."""
    if counts.max() > MOST_COMPONENTS:
        raise BundleError(f"{counts.max()} components of a user at a module, allowed: {MOST_COMPONENTS}")
    if bool((part.user[1:] < part.user[:-1]).any()):
        raise BundleError("components that are not in the order of their users")
    place = modes.places(counts.astype(np.int64))
    for side in (part.left, part.right):
        if (side.axis.numpy() != np.where(side.coords_width.numpy() == AXIS, place, 0)).any():
            raise BundleError("an axis that is not the place of the component among those of its user")


def _rows(side: Side, field: str, width: int) -> Floats:
    if field == "own":
        return side.own[side.own_width[side.own_width > 0] == width].numpy()
    rows: Floats = side.coords[side.coords_width[side.coords_width > AXIS] == width].numpy()
    return rows * np.float32(COORDS.get(width, 1))


def _pack(numbers: Floats, field: str, width: int) -> bytes:
    if width in FLOATS:
        return streams.pack_floats(numbers, width)
    integers = np.rint(numbers)
    if width != TERNARY or not integers.size:
        return streams.pack(integers, _LIMITS[field, width])
    data = golomb.encode(integers.astype(np.int8))
    if integers.size > _most_ternary(data):
        raise BundleError(f"{integers.size} ternary numbers in {len(data)} bytes: too few of them are not 0")
    return data


class _Numbers:
    """The numbers of one stream: inflated and checked as a whole, made floats where they are taken."""

    def __init__(self, data: bytes, count: int, field: str, width: int, source: str) -> None:
        self._scale = np.float32(1)
        self._digits: streams.Digits | None = None
        self._flat = np.zeros(0, np.float32)
        if width in FLOATS:
            self._flat = streams.unpack_floats(data, count=count, width=width, source=source)
        elif width == TERNARY and count:
            if count > _most_ternary(data):
                held = f"{len(data)} bytes cannot hold them"
                raise BundleError(f"{source}: {count} ternary numbers announced, {held}")
            self._flat = golomb.decode(data, size=count, source=source).astype(np.float32)
        else:
            limit = _LIMITS[field, width]
            self._scale = np.float32(limit if field == "coords" else 1)
            self._digits = streams.Digits(data, count=count, limit=limit, source=source)

    def take(self, begin: int, end: int) -> Floats:
        """The numbers from `begin` up to, not including, `end`."""
        if self._digits is None:
            return self._flat[begin:end]
        return self._digits.take(begin, end).astype(np.float32) / self._scale


def _most_ternary(data: bytes) -> int:
    return max(_FREE_TERNARY, _MOST_TERNARY * len(data))


class PageWriter:
    """Collects coded users, batch after batch, and closes a page when it is full."""

    def __init__(self) -> None:
        self.pages: list[Page] = []
        self._held: list[list[Components]] = []
        self._first = self._users = self._numbers = 0
        self.numbers = 0

    def add(self, parts: list[Components], *, users: int) -> None:
        """The components of the next `users` users, numbered from 0: one entry for every module."""
        self.numbers += sum(numbers(part) + len(part) for part in parts)
        sizes, begin = _sizes(parts, users).tolist(), 0
        while begin < users:
            end = begin
            while end < users and self._numbers < _PAGE_NUMBERS:
                self._numbers += sizes[end]
                end += 1
            whole = end - begin == users
            self._hold(parts if whole else [_of_users(part, begin, end) for part in parts], end - begin)
            begin = end

    def _hold(self, parts: list[Components], users: int) -> None:
        shift = torch.arange(self._users, self._users + users)
        self._held.append([part.renumbered(shift) for part in parts])
        self._users += users
        if self._numbers >= _PAGE_NUMBERS:
            self.close()

    def close(self) -> tuple[Page, ...]:
        """All pages; what is held becomes the last one."""
        if self._users:
            parts = [concatenate(column) for column in zip(*self._held, strict=True)]
            self.pages.append(Page(self._first, self._users, encode(parts, users=self._users)))
            self._first += self._users
            self._held, self._users, self._numbers = [], 0, 0
        return tuple(self.pages)


def _of_users(part: Components, begin: int, end: int) -> Components:
    """The components of the users from `begin` up to, not including, `end`, who are numbered from 0."""
    first, last = torch.searchsorted(part.user, torch.tensor([begin, end])).tolist()
    some = part.select(torch.arange(first, last))
    return Components(some.user - begin, some.gain, some.left, some.right)


def _sizes(parts: Sequence[Components], users: int) -> NDArray[np.int64]:
    """How many coordinates and own numbers everybody has."""
    sizes = np.zeros(users, np.int64)
    for part in parts:
        for side in (part.left, part.right):
            for rows, has in ((side.coords, side.coords_width > AXIS), (side.own, side.own_width > 0)):
                sizes += rows.shape[1] * np.bincount(part.user[has].numpy(), minlength=users)
    return sizes


def numbers(part: Components) -> int:
    """How many coordinates and own numbers components hold."""
    return sum(t.numel() for side in (part.left, part.right) for t in (side.coords, side.own))
