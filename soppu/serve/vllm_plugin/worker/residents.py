"""Residents: the bundles on one worker, and the batch it last prepared. How it is done: `step`, `static`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soppu.errors import BundleError
from soppu.serve.vllm_plugin.worker.layout import Linear
from soppu.serve.vllm_plugin.worker.resident import Resident


class Residents:
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

    def drop(self, start: int) -> None:
        """Forget the bundle whose first row is `start`; no request may be on it. BundleError as `at`."""
        self.at(start)
        del self.residents[start]
        self.clear()

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        self._rows, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _is_prepared(self, rows: np.ndarray, counts: np.ndarray) -> bool:
        """Whether the batch is the one prepared last; another one is remembered."""
        if np.array_equal(rows, self._rows) and np.array_equal(counts, self._counts):
            return True
        self._rows, self._counts = rows.copy(), np.array(counts)
        return False
