"""Step: which rows of which bundle the tokens of one forward pass use: looked up once for all layers.

The engine's compiled graph holds an operator that is opaque to the compiler and asks the process's step.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.library import Library

from soppu.errors import BundleError
from soppu.serve.layers.kernels import Basis, Kernel, Tokens
from soppu.serve.vllm_plugin.worker.resident import Linear, Resident

_MOSTLY = 0.75  # above this share of a batch, computing all of it is faster than selecting tokens


class Residents(ABC):
    """What every step keeps, whatever its kernel. For one thread alone."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = tuple(linears)
        self.residents: dict[int, Resident] = {}  # by first row
        self._rows, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def at(self, start: int) -> Resident:
        """The bundle whose first row is `start`. BundleError if it is not there."""
        if start not in self.residents:
            raise BundleError(f"no resident bundle begins at row {start}; there are {len(self.residents)}")
        return self.residents[start]

    def add(self, resident: Resident) -> None:
        """Serve this bundle's rows from the next pass on."""
        self.residents[resident.start] = resident
        self.clear()

    def exchange(self, resident: Resident) -> None:
        """Serve this in the place of the bundle that begins at the same row, which differs in spare rows."""
        self.residents[resident.start] = resident
        self.clear()

    def drop(self, start: int) -> None:
        """Forget the bundle whose first row is `start`; no request may be on it. BundleError as `at`."""
        self.at(start)
        del self.residents[start]
        self.clear()

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        self._rows, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def begin(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Prepare a forward pass. O(tokens), and nothing where the batch is as before.

        Args:
            rows: (requests,) row number of every request's user; 0 is the base model.
            counts: (requests,) tokens of every request in this pass, in the order of the batch.

        Raises:
            BundleError: a row that no resident bundle has.
        """
        if not (np.array_equal(rows, self._rows) and np.array_equal(counts, self._counts)):
            self._prepare(rows, np.asarray(counts))
            self._rows, self._counts = rows.copy(), np.array(counts)

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """Add to `y` (T, o), in place, what the users change at layer `number` for the input `x` (T, i)."""

    @abstractmethod
    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """`begin` for another batch than the last."""

    def _unknown(self, row: int) -> BundleError:
        return BundleError(f"row {row} belongs to none of {len(self.residents)} bundles")


# tokens served by one cluster of one bundle, and that cluster's bases by layer number
_Group = tuple[Tokens, Sequence[Basis | None]]


class Step(Residents):
    """The bundles on one worker, and the tokens of the pass under way. For one thread alone."""

    def __init__(self, linears: Sequence[Linear], kernel: Kernel) -> None:
        super().__init__(linears)
        self._kernel = kernel
        self._groups: list[_Group] = []

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        super().clear()
        self._groups = []

    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """See `Residents.apply`."""
        for tokens, bases in self._groups:
            if (basis := bases[number]) is not None:
                self._kernel(x, y, basis, tokens)

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        self._groups = list(self._grouped(np.repeat(rows, counts))) if rows.any() else []

    def _grouped(self, rows: np.ndarray) -> Iterator[_Group]:
        known = rows == 0
        for resident in self.residents.values():
            here = (rows >= resident.start) & (rows < resident.start + resident.rows)
            known |= here
            local = np.where(here, rows - resident.start, 0)
            for cluster in np.unique(resident.cluster[local[here]]).tolist():
                mine = here & (resident.cluster[local] == cluster)
                yield self._group(resident, cluster, np.where(mine, local, -1))
        if not known.all():
            raise self._unknown(int(rows[~known][0]))

    def _group(self, resident: Resident, cluster: int, local: np.ndarray) -> _Group:
        """Tokens by the rows of a bundle, -1 those that are not its cluster's."""
        device, order = resident.cores.device, _order(local)
        if order is not None:
            local = local[order]
        none = local < 0
        tokens = Tokens(
            resident.cores,
            torch.from_numpy(np.where(none, -1, resident.core[local])).to(device),
            None if order is None else torch.from_numpy(order).to(device),
        )
        users = np.where(none, -1, resident.recorded[local])
        if (users >= 0).any():
            tokens = replace(tokens, records=resident.records, users=torch.from_numpy(users).to(device))
        by_layer = (resident.bases[linear.name][cluster] for linear in self.linears)
        return tokens, [None if basis.idle else basis for basis in by_layer]


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
