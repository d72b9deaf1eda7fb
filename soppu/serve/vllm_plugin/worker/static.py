"""StaticStep: what `step.Step` does, for engines that record a pass once and replay it, as CUDA graphs do.

What a recorded pass reads must stay in place, whoever is in the batch. So a layer's bases lie in one tensor,
every request's cores are copied before the pass, and each token reads the number of its copy and the place of
its basis from buffers. Tokens of the base model read copy 0, all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soppu.errors import BundleError
from soppu.serve.vllm_plugin.worker.kernels import CHUNK
from soppu.serve.vllm_plugin.worker.resident import Linear, Resident
from soppu.serve.vllm_plugin.worker.step import Residents


@dataclass(frozen=True)
class Limits:
    """Sizes of the buffers: tokens and requests in one pass, bases of all bundles together."""

    tokens: int
    requests: int
    bases: int


@dataclass(frozen=True, eq=False)
class _Layer:
    """V (i, bases, m, k); U of every part (bases, k, size); where the cores begin in a copy."""

    V: Tensor
    U: tuple[Tensor, ...]
    at: tuple[int, ...]
    offset: int


class StaticStep(Residents):
    """Same methods as `Step`. Bundles are built with the ranks of the first: see `resident.Form.ranks`."""

    def __init__(self, linears: Sequence[Linear], first: Resident, limits: Limits) -> None:
        super().__init__(linears)
        self._limits = limits
        self._layers = [_layer(line, first, limits.bases) for line in linears]
        cores = first.cores
        self._copies = cores.new_zeros(limits.requests + 1, cores.shape[1])
        self._copy = torch.zeros(limits.tokens, dtype=torch.int64, device=cores.device)
        self._base = torch.arange(limits.tokens, device=cores.device) * limits.bases
        self._places: dict[tuple[int, int], int] = {}  # (first row, cluster) -> place of the basis
        self.add(first)

    def add(self, resident: Resident) -> None:
        """Serve this bundle's rows from the next pass on. BundleError where its bases find no place."""
        clusters = len(next(iter(resident.bases.values()))) if resident.bases else 0
        free = sorted(set(range(self._limits.bases)) - set(self._places.values()))
        if clusters > len(free):
            raise BundleError(
                f"{clusters} bases are needed, {len(free)} of {self._limits.bases} are free;"
                " drop a bundle first"
            )
        for cluster, place in zip(range(clusters), free, strict=False):
            self._places[resident.start, cluster] = place
            for linear, layer in zip(self.linears, self._layers, strict=True):
                basis = resident.bases[linear.name][cluster]
                layer.V[:, place] = basis.V.view(layer.V[:, place].shape)
                for held, (_, U) in zip(layer.U, basis.outputs(), strict=True):
                    held[place] = U
        super().add(resident)

    def drop(self, start: int) -> None:
        """As `Residents.drop`; the places of its bases are free again."""
        super().drop(start)
        self._places = {key: place for key, place in self._places.items() if key[0] != start}

    def clear(self) -> None:
        """Serve the base model until the next `begin`."""
        super().clear()
        self._copy.zero_()

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Copy the users' cores, and write every token's copy and basis to the buffers."""
        users, which = np.unique(rows, return_inverse=True)
        copies, places = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
        for number, row in enumerate(users.tolist()):
            if row:
                copies[number] = number + 1
                places[number] = self._fill(row, number + 1)
        tokens, bases, device = int(counts.sum()), self._limits.bases, self._copy.device
        self._copy[:tokens] = torch.from_numpy(np.repeat(copies[which], counts)).to(device)
        self._copy[tokens:] = 0  # a replayed pass may be longer than the batch
        where = np.arange(tokens) * bases + np.repeat(places[which], counts)
        self._base[:tokens] = torch.from_numpy(where).to(device)

    def apply(self, x: Tensor, y: Tensor, number: int) -> None:
        """See `Residents.apply`."""
        layer = self._layers[number]
        for begin in range(0, len(x), CHUNK):
            end = min(begin + CHUNK, len(x))
            self._add(layer, x[begin:end], y[begin:end], (begin, end))

    def _add(self, layer: _Layer, x: Tensor, y: Tensor, span: tuple[int, int]) -> None:
        _, bases, m, k = layer.V.shape
        where = self._base[span[0] : span[1]] - span[0] * bases
        t = (x @ layer.V.flatten(1)).view(-1, m, k).index_select(0, where)
        cores = self._copies[:, layer.offset : layer.offset + m * k * k].index_select(
            0, self._copy[span[0] : span[1]]
        )
        s = torch.bmm(t.view(-1, 1, k), cores.view(-1, k, k)).view(-1, m * k)
        spread = s.new_zeros(len(x) * bases, m * k).index_copy_(0, where, s).view(-1, bases, m, k)
        for part, (at, U) in enumerate(zip(layer.at, layer.U, strict=True)):
            y[:, at : at + U.shape[2]].addmm_(spread[:, :, part].reshape(-1, bases * k), U.flatten(0, 1))

    def _fill(self, row: int, copy: int) -> int:
        """Copy a row's cores; the place of its basis."""
        for start, resident in self.residents.items():
            if start <= row < start + resident.rows:
                self._copies[copy] = resident.cores[row - start]
                return self._places[start, int(resident.cluster[row - start])]
        raise self._unknown(row)


def _layer(linear: Linear, first: Resident, bases: int) -> _Layer:
    basis, m = first.bases[linear.name][0], len(linear.parts)
    return _Layer(
        V=basis.V.new_zeros(linear.size, bases, m, basis.k),
        U=tuple(basis.U.new_zeros(bases, basis.k, part.size) for part in linear.parts),
        at=tuple(part.at for part in linear.parts),
        offset=basis.offset,
    )
