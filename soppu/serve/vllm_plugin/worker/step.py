"""Step: which rows of which bundle the tokens of one forward pass use: looked up once for all layers.

The engine's compiled graph holds an operator that is opaque to the compiler and asks the process's step.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.library import Library

from soppu.errors import BundleError
from soppu.serve.bank.resident import DEFAULT_RESIDENT
from soppu.serve.bank.resident import Residents as Table
from soppu.serve.layers.kernels import Basis, Kernel, Tokens
from soppu.serve.vllm_plugin.worker.resident import Linear, Resident, Row

_MOST_UNREAD = 1 << 20  # as many as a batch has
_MOSTLY = 0.75  # above this share of a batch, computing all of it is faster than selecting tokens


@dataclass(frozen=True, eq=False)
class Use:
    """That a row is in the batch: it stays in memory for as long."""

    row: Row


class Residents(ABC):
    """What every step keeps, whatever its kernel. For one thread alone.

    Rows are read from their bundle when they are first in a batch; at most `limit` bytes of them are kept, by
    their last use, beside those that are in the batch that is prepared.
    """

    def __init__(self, linears: Sequence[Linear], *, limit: int = DEFAULT_RESIDENT) -> None:
        self.linears = tuple(linears)
        self.residents: dict[int, Resident] = {}  # by first row
        self.table: Table[tuple[int, int], Row]
        self.table = Table(
            lambda key: self.residents[key[0]].read(key[1]),
            limit=limit,
            weigh=lambda row: row.size,
            most_unread=_MOST_UNREAD,
        )
        self._rows, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._uses: dict[int, tuple[Resident, Use]] = {}  # by row

    def at(self, start: int) -> Resident:
        """The bundle whose first row is `start`. BundleError if it is not there."""
        if start not in self.residents:
            raise BundleError(f"no resident bundle begins at row {start}; there are {len(self.residents)}")
        return self.residents[start]

    def add(self, resident: Resident) -> None:
        """Serve this bundle's rows from the next pass on."""
        self.residents[resident.start] = resident
        self.clear()

    def read_ahead(self, start: int) -> None:
        """Read the users of the bundle whose first row is `start` before they are in a batch."""
        shelf = self.at(start).shelf
        keys = ((start, place) for place in range(len(shelf.users)))
        self.table.read_ahead(keys, lambda: start in self.residents)

    def exchange(self, resident: Resident) -> None:
        """Serve this in the place of the bundle that begins at the same row, which differs in spare rows."""
        self.residents[resident.start] = resident
        self.clear()

    def drop(self, start: int) -> None:
        """Forget the bundle whose first row is `start`; no request may be on it. BundleError as `at`."""
        self.at(start)
        del self.residents[start]
        self.clear()
        self.table.forget(lambda key: key[0] == start)

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        self._rows, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._uses = {}

    def begin(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Prepare a forward pass. O(tokens), and nothing where the batch is as before; a page for a new user.

        Args:
            rows: (requests,) row number of every request's user; 0 is the base model.
            counts: (requests,) tokens of every request in this pass, in the order of the batch.

        Raises:
            BundleError: a row that no resident bundle has, or one whose page is damaged.
        """
        if not (np.array_equal(rows, self._rows) and np.array_equal(counts, self._counts)):
            self._uses = self._taken([row for row in np.unique(rows).tolist() if row])
            self.table.trim()  # of rows that were in the batch before
            self._prepare(rows, np.asarray(counts))
            self._rows, self._counts = rows.copy(), np.array(counts)

    def _taken(self, rows: Sequence[int]) -> dict[int, tuple[Resident, Use]]:
        """Every row but 0, its bundle and what it has; newcomers are read side by side."""
        taken, users = dict[int, tuple[Resident, Use]](), dict[int, tuple[Resident, int]]()
        for row in rows:
            resident = self._resident(row)
            place = row - resident.start
            if place in resident.spare:
                taken[row] = resident, Use(resident.added.get(place) or resident.nobody())
            else:
                users[row] = resident, place
        keys = [(resident.start, place) for resident, place in users.values()]
        for row, use in zip(users, self.table.take_all(keys, Use), strict=True):
            taken[row] = users[row][0], use
        return dict(sorted(taken.items()))

    def _resident(self, row: int) -> Resident:
        for start, resident in self.residents.items():
            if start <= row < start + resident.rows:
                return resident
        raise BundleError(f"row {row} belongs to none of {len(self.residents)} bundles")

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """Add to `y` (T, o), in place, what the users change at layer `number` for the input `x` (T, i)."""

    @abstractmethod
    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """`begin` for another batch than the last."""


# tokens served by one cluster of one bundle, and that cluster's bases by layer number
_Group = tuple[Tokens, Sequence[Basis | None]]


class _Cores:
    """The cores of the rows in a batch, a copy of each in one table; the last row of it is zero."""

    def __init__(self, like: Tensor) -> None:
        self.table = like.new_zeros(1, len(like))
        self._held: dict[int, tuple[Row, int]] = {}  # id -> the row, and where its copy is

    def of(self, rows: Sequence[Row]) -> list[int]:
        """Where everyone's core is; -1 where there is none. O(what is new)."""
        some = {id(row): (row, row.core) for row in rows if row.core is not None}
        self._held = {key: held for key, held in self._held.items() if key in some}
        if len(some) >= len(self.table):
            self.table, self._held = self.table.new_zeros(2 * len(some) + 1, self.table.shape[1]), {}
        taken = {place for _, place in self._held.values()}
        free = iter([place for place in range(len(self.table) - 1) if place not in taken])
        for key, (row, core) in some.items():
            if key not in self._held:
                self._held[key] = row, next(free)
                self.table[self._held[key][1]] = core
        return [self._held[id(row)][1] if row.core is not None else -1 for row in rows]


class Step(Residents):
    """The bundles on one worker, and the tokens of the pass under way. For one thread alone."""

    def __init__(self, linears: Sequence[Linear], kernel: Kernel, *, limit: int = DEFAULT_RESIDENT) -> None:
        super().__init__(linears, limit=limit)
        self._kernel = kernel
        self._groups: list[_Group] = []
        self._cores: dict[int, _Cores] = {}  # by first row of a bundle

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        super().clear()
        self._groups = []

    def drop(self, start: int) -> None:
        """As `Residents.drop`."""
        super().drop(start)
        self._cores.pop(start, None)

    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """See `Residents.apply`."""
        for tokens, bases in self._groups:
            if (basis := bases[number]) is not None:
                self._kernel(x, y, basis, tokens)

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        tokens = np.repeat(rows, counts)
        by_bundle: dict[int, list[int]] = {}
        for row, (resident, _) in self._uses.items():
            by_bundle.setdefault(resident.start, []).append(row)
        self._groups = [
            group for start, here in by_bundle.items() for group in self._grouped(start, here, tokens)
        ]

    def _grouped(self, start: int, rows: list[int], tokens: np.ndarray) -> Iterator[_Group]:
        """One group a cluster, of the tokens of one bundle's rows, which are in order."""
        resident, used = self.residents[start], [self._uses[row][1].row for row in rows]
        held = self._cores.setdefault(start, _Cores(resident.like))
        cores, (table, places) = np.array(held.of(used)), resident.joined.of([row.record for row in used])
        users = np.array([p if len(r.record.data) else -1 for p, r in zip(places, used, strict=True)])
        clusters = np.array([row.cluster for row in used])
        which = np.searchsorted(rows, tokens).clip(max=len(rows) - 1)
        mine = np.array(rows)[which] == tokens
        for cluster in np.unique(clusters).tolist():
            local = np.where(mine & (clusters[which] == cluster), which, -1)
            order = _order(local)
            if order is not None:
                local = local[order]
            device, none = resident.like.device, local < 0
            made = Tokens(
                held.table,
                torch.from_numpy(np.where(none, -1, cores[local])).to(device),
                None if order is None else torch.from_numpy(order).to(device),
            )
            recorded = np.where(none, -1, users[local])
            if (recorded >= 0).any():
                made = replace(made, records=table, users=torch.from_numpy(recorded).to(device))
            by_layer = (resident.bases[linear.name][cluster] for linear in self.linears)
            yield made, [None if basis.idle else basis for basis in by_layer]


def _order(local: np.ndarray) -> np.ndarray | None:
    """In which order tokens are worked on: a user's together, so that what is the user's is read once.

    None for all of them as they come: where that is so already, and most of them are somebody's.
    """
    changes = int((local[1:] != local[:-1]).sum()) + 1
    some = local >= 0
    if some.mean() >= _MOSTLY and changes == len(np.unique(local)):
        return None
    chosen = some.nonzero()[0]
    return chosen[np.argsort(local[chosen], kind="stable")]


class _Current:
    step: Residents | None = None  # of this process's worker


def serve(step: Residents) -> None:
    """Let `torch.ops.soppu.apply` ask `step` from now on."""
    register()
    _Current.step = step


@functools.cache
def register() -> Library:
    """Define `torch.ops.soppu.apply`, once in a process; the library lives as long as its definition."""
    library = Library("soppu", "FRAGMENT")
    library.define("apply(Tensor x, Tensor(a!) y, int layer) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("apply", _apply, dispatch_key="CompositeExplicitAutograd")
    library.impl("apply", lambda x, y, layer: None, dispatch_key="Meta")
    return library


def _apply(x: Tensor, y: Tensor, layer: int) -> None:
    if _Current.step is not None:
        _Current.step.apply(x, y, layer)
