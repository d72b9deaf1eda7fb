"""Step: which rows of which bundle the tokens of one forward pass use: looked up once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soppu.serve.vllm_plugin.worker.kernels import Kernel, Tokens
from soppu.serve.vllm_plugin.worker.layout import Linear
from soppu.serve.vllm_plugin.worker.resident import Basis, Resident
from soppu.serve.vllm_plugin.worker.residents import Residents

_MOSTLY = 0.75  # above this share of a batch, computing all of it is faster than selecting tokens


@dataclass(frozen=True, eq=False)
class _Group:
    """Tokens served by one cluster of one bundle, and that cluster's bases by layer number."""

    tokens: Tokens
    bases: Sequence[Basis | None]


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
        for group in self._groups:
            basis = group.bases[number]
            if basis is not None:
                self._kernel(x, y, basis, group.tokens)

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        self._groups = list(self._grouped(np.repeat(rows, counts))) if rows.any() else []

    def _grouped(self, rows: np.ndarray) -> Iterator[_Group]:
        known = rows == 0
        for resident in self.residents.values():
            here = (rows >= resident.start) & (rows < resident.start + resident.rows)
            known |= here
            clusters = np.unique(resident.cluster[rows[here] - resident.start])
            local = np.where(here, rows - resident.start, resident.rows)
            for cluster in clusters.tolist():
                mine = here & (resident.cluster[local] == cluster)
                yield self._group(resident, cluster, np.where(mine, local, resident.rows), mine)
        if not known.all():
            raise self._unknown(int(rows[~known][0]))

    def _group(self, resident: Resident, cluster: int, local: np.ndarray, mine: np.ndarray) -> _Group:
        device, places = resident.cores.device, None
        if mine.mean() < _MOSTLY:
            chosen = mine.nonzero()[0]
            local, places = local[chosen], torch.from_numpy(chosen).to(device)
        tokens = Tokens(resident.cores, torch.from_numpy(local).to(device), places)
        return _Group(tokens, self._bases(resident, cluster))

    def _bases(self, resident: Resident, cluster: int) -> list[Basis | None]:
        by_layer = (resident.bases.get(linear.name) for linear in self.linears)
        return [bases[cluster] if bases else None for bases in by_layer]
