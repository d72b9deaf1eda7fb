"""Adding the users' change to a layer's output: in plain torch, or by the compiled CPU kernel.

Both take the same arguments and give the same result up to rounding. For which tokens is decided elsewhere:
by `routing`, and in vLLM by `step`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.errors import ConfigError
from soppu.serve.layers import native as compiled
from soppu.serve.layers import records
from soppu.serve.layers.records import Records

_LOG = logging.getLogger(__name__)
Ranks = tuple[int, int]  # k_out, k_in
Sides = tuple[Tensor | None, Tensor | None]  # U, V; None where nobody refers to it
_LANES = 16  # columns of a panel
CHUNK = 512  # tokens whose cores are gathered at a time: bounds what a long prompt needs


@dataclass(frozen=True, eq=False)
class Basis:
    """The bases of one cluster at one layer, its m parts side by side; ranks padded with zeros to one pair.

    A rank is 0 where nobody has coordinates on that side.
    """

    V: Tensor  # (i, m k_in) input bases
    U: Tensor  # (k_out * sum of part sizes,) output bases of the parts, (k_out, size) each, end to end
    k: Ranks  # that all parts have here
    offset: int  # where the layer's m cores (k_in, k_out) begin in a row of the table
    # (m, 5) int64 of every part: first column, size, number in the records (-1: in none), and its own ranks,
    # k_out and k_in, which are how long the records' rows of coordinates are
    spans: Tensor

    @classmethod
    def of(
        cls,
        sides: Sequence[Sides],
        spans: Sequence[tuple[int, int, int]],
        *,
        like: Tensor,
        k: Ranks | None = None,
        offset: int = 0,
    ) -> Basis:
        """From U (size, k_out) and V (i, k_in) of every part, whose ranks may be less than `k`, or None.

        Args:
            like: (i, 0), of the type and on the device that the layer computes in.
            k: the ranks that all parts are padded to; the widest of theirs by default.
            spans: first column, size and number in the records of every part.
        """
        own = [[0 if side is None else side.shape[1] for side in pair] for pair in sides]
        k = k or (max(out for out, _ in own), max(inn for _, inn in own))
        V = torch.zeros(len(like), len(sides), k[1])
        outputs = [torch.zeros(k[0], size) for _, size, _ in spans]
        for number, (out, inn) in enumerate(sides):
            if inn is not None:
                V[:, number, : inn.shape[1]] = inn
            if out is not None:
                outputs[number][: out.shape[1]] = out.mT
        U = torch.cat([U.flatten() for U in outputs])
        rows = [(*span, *ranks) for span, ranks in zip(spans, own, strict=True)]
        return cls(V.flatten(1).to(like), U.to(like), k, offset, torch.tensor(rows))

    @property
    def idle(self) -> bool:
        """Whether there is nothing that anybody could use."""
        return not self.V.numel() and not self.U.numel() and bool((self.spans[:, 2] < 0).all())

    @functools.cached_property
    def panels(self) -> tuple[Tensor, Tensor]:
        """V and U as the compiled kernel reads them, part after part. A copy, made when first asked for."""
        return panels(self.V), torch.cat([panels(U) for _, U in self.outputs()])

    def outputs(self) -> list[tuple[int, Tensor]]:
        """(first column, U (k_out, size)) of every part; views."""
        starts, sizes, *_ = self.spans.T.tolist()
        views = self.U.split([self.k[0] * size for size in sizes])
        return [(at, view.view(self.k[0], size)) for at, size, view in zip(starts, sizes, views, strict=True)]


def panels(matrix: Tensor) -> Tensor:
    """A matrix (d, w) as the compiled kernel reads it: flat, 64 bytes after 64 bytes.

    Panels of 16 columns, in each row after row; two rows of bfloat16 lie number beside number, as processors
    multiply pairs of them. Zeros fill the last panel and the last pair.
    """
    d, w = matrix.shape
    deep = 4 // matrix.element_size()
    units, columns = -(-d // deep), -(-w // _LANES)
    padded = matrix.new_zeros(units * deep, columns * _LANES)
    padded[:d, :w] = matrix
    return padded.view(units, deep, columns, _LANES).permute(2, 0, 3, 1).flatten()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Whose tokens they are: rows of a table of cores, and users of a table of records."""

    cores: Tensor  # (rows + 1, width) the table; the last row is zero
    rows: Tensor  # (t,) int64 every token's row; -1 where it has no core
    places: Tensor | None  # (t,) int64 where those tokens stand in the batch; None: they are the first t
    records: Records | None = None
    users: Tensor | None = None  # (t,) int64 whose record every token uses; -1 for none


Kernel = Callable[[Tensor, Tensor, Basis, Tokens], None]


def plain(x: Tensor, y: Tensor, basis: Basis, tokens: Tokens) -> None:
    """`x` (T, i): add U S V^T x and the records' change to the tokens' rows of `y` (T, o), in place.

    O(t (m k (i + k) + k o)), and O(c (i + o)) for c components of a token's user.
    """
    for begin in range(0, len(tokens.rows), CHUNK):
        end = min(begin + CHUNK, len(tokens.rows))
        users = None if tokens.users is None else tokens.users[begin:end]
        part = Tokens(tokens.cores, tokens.rows[begin:end], None, tokens.records, users)
        if tokens.places is None:
            _plain(x[begin:end], y[begin:end], basis, part)
        else:
            places = tokens.places[begin:end]
            some = y[places]
            _plain(x[places], some, basis, part)
            y[places] = some


def _plain(x: Tensor, y: Tensor, basis: Basis, tokens: Tokens) -> None:
    m, (k_out, k_in) = len(basis.spans), basis.k
    t = (x @ basis.V).view(len(x), m, k_in)
    s = t.new_zeros(len(x), m, k_out)
    if k_out and k_in and bool((tokens.rows >= 0).any()):
        cores = tokens.cores[tokens.rows, basis.offset : basis.offset + m * k_in * k_out]
        s = torch.bmm(t.view(-1, 1, k_in), cores.view(-1, k_in, k_out)).view(-1, m, k_out)
    if tokens.users is not None and tokens.records is not None:
        for user in tokens.users.unique().tolist():
            if user >= 0:
                _own(x, y, (t, s), basis, _Mine(tokens.records, user, (tokens.users == user).nonzero()[:, 0]))
    for number, (at, U) in enumerate(basis.outputs()):
        y[:, at : at + U.shape[1]].addmm_(s[:, number], U)


@dataclass(frozen=True, eq=False)
class _Mine:
    """One user's tokens, by their places."""

    records: Records
    user: int
    places: Tensor


def _own(x: Tensor, y: Tensor, inner: tuple[Tensor, Tensor], basis: Basis, mine: _Mine) -> None:
    """What a record adds to `y`, and to the coordinates s of `inner` = (t, s)."""
    t, s = inner
    for number, (at, size, module, *_) in enumerate(basis.spans.tolist()):
        part = records.unpack(mine.records, mine.user, module) if module >= 0 else None
        if part is None:
            continue
        k_out, k_in = mine.records.ranks[module]
        weight = x[mine.places].float() @ part.q.mT * part.right
        weight += t[mine.places, number, :k_in].float() @ part.b.mT
        s[mine.places, number, :k_out] += (weight @ part.a).to(x.dtype)
        y[mine.places, at : at + size] += (weight * part.left @ part.p).to(x.dtype)


def native(x: Tensor, y: Tensor, basis: Basis, tokens: Tokens) -> None:
    """`plain` in one pass, compiled: a fraction of the time at the batch sizes of decoding. CPU only."""
    held = tokens.records
    table = (tokens.cores, basis.spans, tokens.rows, tokens.places)
    own = (None, None, None) if held is None else (tokens.users, held.data, held.starts)
    torch.ops.soppu_native.apply(x, y, *basis.panels, *table, *own, basis.k, basis.offset)


def choose(kind: str, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for `kind`, "auto", "native" or "torch".

    Raises:
        ConfigError: "native" was asked for and cannot be had; the message says why.
    """
    if kind == "torch":
        return plain
    if device.type != "cpu" or dtype not in compiled.TYPES:
        why = f"it exists for float32 and bfloat16 on the CPU, the model is {dtype} on {device.type}"
    elif not (why := compiled.load()):
        return native
    if kind == "native":
        raise ConfigError(f"SOPPU_KERNEL='native': {why}; allowed here are auto, torch")
    if device.type == "cpu":
        _LOG.warning("the compiled kernel cannot be had, plain torch serves more slowly: %s", why)
    return plain
