"""Records: users' components as the integers that a bundle holds, packed for the kernels that widen them.

A user's change at a module, sum_j u_j v_j^T with u_j = U a_j + p_j and v_j = V b_j + q_j, lies here as up to
four rows a component: numbers of its own and coordinates, of the input side (right) and of the output side
(left). A row is integers and one scale; it is taken apart nowhere but here and in `kernel.cpp`.

All is in 32-bit words. A user's record begins with one offset for each module, 0 where the user has nothing;
there lie the numbers of rows of either side and of components, the rows' heads, and their numbers. A head is
kind | coordinates << 7 | exceptions << 8 | component << 16, the scale as a float32, and an offset. Behind a
row's numbers come its exceptions, place << 8 | what is missing there: the few that four bits cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soppu.compress.numbers.components import Components, Side, ordinals
from soppu.compress.numbers.quantise import AXIS, COORDS, FLOATS
from soppu.errors import BundleError

Pairs = tuple[tuple[int, int], ...]
Words = NDArray[np.uint32]
Ints = NDArray[np.int64]
SPARSE, BYTES, NIBBLES, FIVES, THREES, FLOAT = range(6)  # how a row's numbers lie
# kind -> (numbers in a byte, their base); the largest in size is half the base
PACKINGS = {BYTES: (1, 256), NIBBLES: (2, 15), FIVES: (3, 5), THREES: (5, 3)}
_RADIX = {NIBBLES: 16}  # a power of two where the base need not be: digits are then shifts
_HEAD, _ROW = 3, 3  # words of a module's and of a row's head
_LIMIT = 7  # of four bits
_MOST_EXCEPTIONS = 255
_RARE = 64  # at most one exception in so many numbers
_MOST_ROWS = 1 << 16  # components of a user at a module; what a head can tell apart
IN_COORDS, OUT_COORDS = 1 << 31, 1 << 30  # flags beside the number of components


def stride(kind: int, features: int) -> int:
    """Bytes of a row without its exceptions: whole vectors of `kernel.cpp`, 16 entries each."""
    if kind == SPARSE:
        return 0
    group = 1 if kind == FLOAT else PACKINGS[kind][0]
    return -(-features // group // 16) * 16 * (4 if kind == FLOAT else 1)


@dataclass(frozen=True, eq=False)
class Records:
    """The records of n users; always in the processor's memory."""

    data: Tensor  # (words,) int32
    starts: Tensor  # (n + 1,) int64; user n has the words from starts[n] up to, not including, starts[n + 1]
    shapes: Pairs  # (o, i) of every module, as these rows are long
    ranks: Pairs  # (k_out, k_in) of every module's basis
    floats: bool = False  # whether any numbers are floats rather than integers

    @classmethod
    def empty(cls, users: int, shapes: Pairs, ranks: Pairs) -> Records:
        """Of users who have nothing."""
        starts = torch.zeros(users + 1, dtype=torch.int64)
        return cls(torch.zeros(0, dtype=torch.int32), starts, shapes, ranks)

    @classmethod
    def join(cls, parts: Sequence[Records]) -> Records:
        """The users of several tables, one after the other."""
        ends = np.cumsum([0, *(len(part.data) for part in parts)])
        starts = [part.starts[:-1] + int(end) for part, end in zip(parts, ends, strict=False)]
        starts.append(torch.tensor([int(ends[-1])]))
        data = torch.cat([part.data for part in parts])
        floats = any(part.floats for part in parts)
        return cls(data, torch.cat(starts), parts[0].shapes, parts[0].ranks, floats)

    def slice(self, begin: int, end: int) -> Records:
        """The users from `begin` up to, not including, `end`. Copies nothing."""
        first, last = self.starts[[begin, end]].tolist()
        starts = self.starts[begin : end + 1] - first
        return Records(self.data[first:last], starts, self.shapes, self.ranks, self.floats)

    def offsets(self) -> NDArray[np.int32]:
        """(n, modules) where the parts of every record begin; 0 is nowhere. O(n modules)."""
        starts, modules = self.starts.numpy(), len(self.shapes)
        made = np.zeros((len(starts) - 1, modules), np.int32)
        has = starts[1:] > starts[:-1]
        made[has] = self.data.numpy()[starts[:-1][has][:, None] + np.arange(modules)]
        return made

    def components(self) -> NDArray[np.int64]:
        """(n, modules) how many components everybody has. O(n modules)."""
        offsets, made = self.offsets(), np.zeros((len(self.starts) - 1, len(self.shapes)), np.int64)
        user, module = offsets.nonzero()
        at = self.starts.numpy()[user] + offsets[user, module] + 2
        made[user, module] = self.data.numpy().view(np.uint32)[at] & (OUT_COORDS - 1)
        return made


@dataclass(frozen=True, eq=False)
class Part:
    """One user's c components at one module, taken apart: D = (p * left + U a) (q * right + V b)^T."""

    p: Tensor  # (c, o) float32 of integers
    left: Tensor  # (c,) float32 their scales
    q: Tensor  # (c, i)
    right: Tensor  # (c,)
    a: Tensor  # (c, k_out) coordinates, scaled
    b: Tensor  # (c, k_in)


def unpack(records: Records, user: int, module: int) -> Part | None:
    """What a user has at a module; None where that is nothing. O(c (o + i))."""
    start = int(records.starts[user])
    if start == int(records.starts[user + 1]):
        return None
    words = records.data.numpy()[start : int(records.starts[user + 1])].view(np.uint32)
    at = int(words[module])
    if not at:
        return None
    here = words[at:]
    right, left, c = int(here[0]), int(here[1]), int(here[2]) & (OUT_COORDS - 1)
    heads = here[_HEAD : _HEAD + _ROW * (right + left)].reshape(-1, _ROW)
    (o, i), (k_out, k_in) = records.shapes[module], records.ranks[module]
    q, right_scale, b = _side(here, heads[:right], c, (i, k_in))
    p, left_scale, a = _side(here, heads[right:], c, (o, k_out))
    return Part(p, left_scale, q, right_scale, a, b)


def _side(words: Words, heads: Words, c: int, sizes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    own, scale = np.zeros((c, sizes[0]), np.float32), np.zeros(c, np.float32)
    coords = np.zeros((c, sizes[1]), np.float32)
    scales = heads[:, 1].copy().view(np.float32)
    for kind in np.unique(heads[:, 0] & 0xFF).tolist():
        chosen = (heads[:, 0] & 0xFF == kind).nonzero()[0]
        d = sizes[kind >> 7]
        rows = _widened(words, heads[chosen], kind & 0x7F, d)
        component = heads[chosen, 0] >> 16
        if kind >> 7:
            coords[component] = rows * scales[chosen, None]
        else:
            own[component], scale[component] = rows, scales[chosen]
    return torch.from_numpy(own), torch.from_numpy(scale), torch.from_numpy(coords)


def _widened(words: Words, heads: Words, kind: int, d: int) -> NDArray[np.float32]:
    """The numbers (m, d) of rows of one kind."""
    dense = stride(kind, d) // 4
    made = _digits(words[heads[:, 2, None] + np.arange(dense)], kind, d)
    for row, (head, offset) in enumerate(heads[:, [0, 2]].tolist()):
        for word in words[offset + dense : offset + dense + (head >> 8 & 0xFF)].tolist():
            made[row, word >> 8] += word & 0xFF if word & 0xFF < 128 else (word & 0xFF) - 256
    return made


def _digits(words: Words, kind: int, d: int) -> NDArray[np.float32]:
    if kind == SPARSE:
        return np.zeros((len(words), d), np.float32)
    if kind == FLOAT:
        return words.view(np.float32)[:, :d].copy()
    if kind == BYTES:
        return words.view(np.int8)[:, :d].astype(np.float32)
    group, base = PACKINGS[kind]
    packed, columns = words.view(np.uint8), []
    for _ in range(group):
        packed, digit = np.divmod(packed, np.uint8(_RADIX.get(kind, base)))
        columns.append(digit)
    return np.concatenate(columns, axis=1)[:, :d].astype(np.float32) - base // 2


@dataclass(frozen=True, eq=False)
class _Rows:
    """m rows of one kind, of one side of one module."""

    head: Words  # (m,) kind, whether coordinates, exceptions, component
    user: Ints  # (m,)
    scale: NDArray[np.float32]  # (m,)
    dense: Words  # (m, words)
    exceptions: Words  # all rows' in order
    place: Ints  # (m,) 2 module + side, right before left


def pack(
    parts: Sequence[Components],
    *,
    users: int,
    cuts: Sequence[tuple[range, range]],
    ranks: Sequence[tuple[int, int]],
) -> Records:
    """The records of users numbered from 0, from their components at every module, norms in the gains.

    O(numbers).

    Args:
        cuts: which outputs and inputs of every module are kept: all, or those of a tensor-parallel rank.
        ranks: (k_out, k_in) of every module's basis.

    Raises:
        BundleError: a user with more components at a module than a record can hold.
    """
    held: dict[_Key, list[_Piece]] = {}
    for module, (part, (out, inn)) in enumerate(zip(parts, cuts, strict=True)):
        if not len(part):
            continue
        component = ordinals(part.user).numpy()
        if component.max() >= _MOST_ROWS // 2:
            raise BundleError(f"{component.max() + 1} components of a user at a module are too many to serve")
        whose = part.user.numpy(), component
        ones = np.ones(len(part), np.float32)
        for key, piece in [
            *_pieces(part.right, ones, _Place(whose, 2 * module, inn)),
            *_pieces(part.left, part.gain.numpy(), _Place(whose, 2 * module + 1, out)),
        ]:
            held.setdefault(key, []).append(piece)
    rows = [row for key, pieces in held.items() for row in _packed(_together(pieces), key)]
    data, starts = _laid_out(rows, users=users, modules=len(parts))
    shapes = tuple((len(out), len(inn)) for out, inn in cuts)
    floats = any(bool((part.head & 0x7F == FLOAT).any()) for part in rows)
    words = torch.from_numpy(data.view(np.int32))
    return Records(words, torch.from_numpy(starts), shapes, tuple(ranks), floats)


@dataclass(frozen=True, eq=False)
class _Place:
    """One side of one module: users and numbers of its components, and the columns that are kept."""

    whose: tuple[Ints, Ints]
    place: int
    cut: range


_Key = tuple[int, int, bool]  # width, numbers of a row, whether they are coordinates


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of one key, whosever and wherever they are; a row stands for its integers times its scale."""

    numbers: NDArray[np.float32]  # (m, columns)
    scale: NDArray[np.float32]  # (m,)
    user: Ints  # (m,)
    component: Ints  # (m,)
    place: Ints  # (m,) 2 module + side, right before left

    def among(self, some: NDArray[np.bool_]) -> _Piece:
        """Those of the rows where `some` is True, without their numbers."""
        where = self.user[some], self.component[some], self.place[some]
        return _Piece(self.numbers[:0], self.scale[some], *where)

    def rows(self, kind: int, coords: bool, dense: Words, exceptions: tuple[Ints, Words]) -> _Rows:
        """As rows of a kind; `exceptions`: how many every one has, and all of them in order."""
        head = (kind | coords << 7 | exceptions[0] << 8 | self.component << 16).astype(np.uint32)
        return _Rows(head, self.user, self.scale, dense, exceptions[1], self.place)


def _pieces(side: Side, gain: NDArray[np.float32], at: _Place) -> Iterator[tuple[_Key, _Piece]]:
    """What one side of a module has, by key: own numbers and coordinates of each width."""
    own_width, coords_width = side.own_width.numpy(), side.coords_width.numpy()
    own, coords = side.own.numpy(), side.coords.numpy()
    for width in np.unique(own_width).tolist():
        if width:
            chosen = (own_width == width).nonzero()[0]
            numbers = own[own_width[own_width > 0] == width]
            norm = np.sqrt(np.einsum("md,md->m", numbers, numbers)).clip(min=_TINY)
            kept = numbers[:, at.cut.start : at.cut.stop]
            scale = side.beta.numpy()[chosen] * gain[chosen] / norm
            yield (width, kept.shape[1], False), _piece(kept, scale, chosen, at)
    for width in np.unique(coords_width).tolist():
        chosen = (coords_width == width).nonzero()[0]
        if width == AXIS:
            axis = side.axis.numpy()[chosen, None].astype(np.float32)  # below 2^16, so exact
            yield (width, 1, True), _piece(axis, gain[chosen], chosen, at)
        elif width:
            limit = COORDS.get(width, 1)
            numbers = coords[coords_width[coords_width > AXIS] == width] * np.float32(limit)
            scale = gain[chosen] / np.float32(limit)
            yield (width, numbers.shape[1], True), _piece(numbers, scale, chosen, at)


def _piece(numbers: NDArray[np.float32], scale: NDArray[np.float32], chosen: Ints, at: _Place) -> _Piece:
    user, component = (one[chosen] for one in at.whose)
    return _Piece(numbers, scale.astype(np.float32), user, component, np.full(len(chosen), at.place))


def _together(pieces: Sequence[_Piece]) -> _Piece:
    columns = ([getattr(one, name) for one in pieces] for name in _PIECE)
    return _Piece(*(np.concatenate(column) for column in columns))


_PIECE = ("numbers", "scale", "user", "component", "place")
_TINY = np.finfo(np.float32).tiny


def _packed(piece: _Piece, key: _Key) -> Iterator[_Rows]:
    """Rows of one key, each as tight as its numbers allow."""
    (width, columns, coords), numbers = key, piece.numbers
    none, nothing = np.zeros(0, np.uint32), np.zeros(len(numbers), np.int64)
    if width == AXIS and coords:
        axes: Words = (numbers[:, 0].astype(np.int64) << 8 | 1).astype(np.uint32)
        yield piece.rows(SPARSE, coords, np.zeros((len(numbers), 0), np.uint32), (nothing + 1, axes))
        return
    if width in FLOATS:
        dense = np.zeros((len(numbers), stride(FLOAT, columns) // 4), np.uint32)
        dense[:, :columns] = np.ascontiguousarray(numbers).view(np.uint32)
        yield piece.rows(FLOAT, coords, dense, (nothing, none))
        return
    integers = np.rint(numbers).astype(np.int8)
    largest = np.abs(integers).max(axis=1, initial=0)
    beyond = (np.abs(integers) > _LIMIT).sum(axis=1)
    rare = beyond <= min(columns // _RARE, _MOST_EXCEPTIONS)
    kind = np.where(rare, NIBBLES, BYTES)
    kind[largest <= 2], kind[largest <= 1] = FIVES, THREES
    for one in np.unique(kind).tolist():
        some = kind == one
        here, counts = integers[some], beyond[some] * (one == NIBBLES)
        row, place = (np.abs(here) > _LIMIT).nonzero() if one == NIBBLES else (none, none)
        rest = here[row, place] - np.clip(here[row, place], -_LIMIT, _LIMIT)
        exceptions: Words = place.astype(np.uint32) << 8 | rest.view(np.uint8)
        dense = _dense(np.clip(here, -_LIMIT, _LIMIT) if one == NIBBLES else here, one)
        yield piece.among(some).rows(one, coords, dense, (counts, exceptions))


def _dense(integers: NDArray[np.int8], kind: int) -> Words:
    """(m, d) integers as words: byte j of a row of L bytes holds the numbers j, j + L, j + 2 L and so on."""
    (m, d), (group, base) = integers.shape, PACKINGS[kind]
    size = stride(kind, d)
    padded = np.zeros((m, group * size), np.int8)
    padded[:, :d] = integers
    if group == 1:
        return padded.view(np.uint32)
    digits = (padded + np.int8(base // 2)).view(np.uint8).reshape(m, group, size)
    made = np.zeros((m, size), np.uint8)
    for digit in reversed(range(group)):
        made = made * np.uint8(_RADIX.get(kind, base)) + digits[:, digit]
    return made.view(np.uint32)


def _laid_out(rows: Sequence[_Rows], *, users: int, modules: int) -> tuple[Words, Ints]:
    """All rows in the order of users, modules, sides and kinds: the words, and where every user begins."""
    if not rows:
        return np.zeros(0, np.uint32), np.zeros(users + 1, np.int64)
    head = np.concatenate([part.head for part in rows]).astype(np.int64)
    user = np.concatenate([part.user for part in rows])
    place = np.concatenate([part.place for part in rows])
    exceptions = head >> 8 & 0xFF
    words = np.concatenate([np.full(len(part.head), part.dense.shape[1]) for part in rows]) + exceptions
    order = np.lexsort((head >> 16, head & 0xFF, place, user))
    group = (user * modules + place // 2)[order]
    counts = np.bincount(group, minlength=users * modules)
    sizes = np.bincount(group, words[order], minlength=users * modules).astype(np.int64)
    sizes = np.where(counts, _HEAD + _ROW * counts + sizes, 0).reshape(users, modules)
    whole = sizes.sum(1) + modules * sizes.any(1)
    starts = np.concatenate([[0], np.cumsum(whole)])
    offsets = np.where(sizes, modules + np.cumsum(sizes, axis=1) - sizes, 0)
    data = np.zeros(int(starts[-1]), np.uint32)
    data[starts[:-1][whole > 0][:, None] + np.arange(modules)] = offsets[whole > 0]
    at = _heads(data, _Sorted(head[order], place[order], group, words[order]), starts[:-1, None] + offsets)
    scale = np.concatenate([part.scale for part in rows])
    data[at[0] + 1] = scale[order].view(np.uint32)
    where = np.empty_like(at[1])
    where[order] = at[1]
    _numbers(data, rows, where)
    return data, starts


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Heads, places, groups and sizes of all rows, in the order they are laid out in."""

    head: Ints
    place: Ints
    group: Ints
    words: Ints


def _heads(data: Words, rows: _Sorted, begins: Ints) -> tuple[Ints, Ints]:
    """Write the heads of modules and rows; where every row's head is, and where its numbers go."""
    groups, first, counts = np.unique(rows.group, return_index=True, return_counts=True)
    begin = begins.reshape(-1)[groups]
    right = np.add.reduceat(rows.place % 2 == 0, first, dtype=np.int64)
    data[begin], data[begin + 1] = right, counts - right
    coords = rows.head >> 7 & 1
    flags = np.where(coords, np.where(rows.place % 2 == 0, IN_COORDS, OUT_COORDS), 0)
    data[begin + 2] = np.maximum.reduceat(rows.head >> 16, first) + 1 | np.bitwise_or.reduceat(flags, first)
    within = np.arange(len(rows.head)) - np.repeat(first, counts)
    at = np.repeat(begin, counts) + _HEAD + _ROW * within
    before = np.cumsum(rows.words) - rows.words
    numbers = np.repeat(_HEAD + _ROW * counts - before[first], counts) + before
    data[at], data[at + 2] = rows.head, numbers
    return at, np.repeat(begin, counts) + numbers


def _numbers(data: Words, rows: Sequence[_Rows], where: Ints) -> None:
    """Write the numbers of every row, and its exceptions behind them; `where` in the order of `rows`."""
    ends = np.cumsum([len(part.head) for part in rows])
    for part, at in zip(rows, np.split(where, ends[:-1]), strict=True):
        columns = part.dense.shape[1]
        data[at[:, None] + np.arange(columns)] = part.dense
        counts = part.head.astype(np.int64) >> 8 & 0xFF
        within = np.arange(len(part.exceptions)) - np.repeat(np.cumsum(counts) - counts, counts)
        data[np.repeat(at, counts) + columns + within] = part.exceptions
