"""Residents: the bundles on one worker, and the batch it last prepared. How it is done: `step`, `static`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from soppu.errors import BundleError
from soppu.serve.vllm_plugin.worker.layout import Linear
from soppu.serve.vllm_plugin.worker.resident import Resident


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
