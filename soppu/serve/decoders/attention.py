"""Attention of rows over their blocks where these lie: the kernel of `attention.cpp`, compiled here."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from soppu.serve import compiled
from soppu.serve.compiled import NotCompiled
from soppu.serve.decoders.kv_cache import KVCache, Step

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("attention.cpp")
_TYPES = (torch.float32, torch.bfloat16)
_MOST_D = 128
_POINTERS = "q k v out blocks table places starts counts".split()
_NUMBERS = "rows tokens q_heads kv_heads d q_stride k_stride v_stride table_stride threads".split()


class _Job(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _NUMBERS]


def runs(dtype: torch.dtype, device: torch.device, d: int) -> bool:
    """Whether the kernel can be had for heads of this size here; the log says why not."""
    if device.type != "cpu" or dtype not in _TYPES or d > _MOST_D:
        return False
    return _library() is not None


class Attending:
    """One step, layer after layer: writes its tokens' keys and values, and attends to them and those before.

    A token gets the same numbers, bit for bit, in whatever company it is read.
    """

    def __init__(self, step: Step, cache: KVCache) -> None:
        self._step, self._cache = step, cache
        self._rows = torch.tensor([list(step.rows), list(step.starts), list(step.counts)])
        places, starts, counts = (row.data_ptr() for row in self._rows)
        b, T = step.ids.shape
        stride, threads = cache.tables.stride(0), torch.get_num_threads()
        self._job = _Job(
            places=places,
            starts=starts,
            counts=counts,
            rows=b,
            tokens=T,
            table_stride=stride,
            threads=threads,
        )
        self._new = torch.empty if min(step.counts) == T else torch.zeros  # nothing is computed for padding

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (m, q, d), keys and values (m, kv, d), a token's numbers side by side -> (m, q d)."""
        out = self._new(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
        self._job.q, self._job.q_stride, self._job.q_heads = q.data_ptr(), q.stride(0), q.shape[1]
        self._job.out = out.data_ptr()
        self.write(layer, k, v)
        return out

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """As a call, of keys and values (m, kv, d) alone."""
        job, tables = self._job, self._cache.tables
        job.k, job.v, job.k_stride, job.v_stride = k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)
        job.blocks = self._cache.store(k).data_ptr()
        job.table = tables.data_ptr() + layer * tables.stride(1) * tables.element_size()
        job.kv_heads, job.d = k.shape[1:]
        library = _library()
        assert library is not None  # else `runs` says so
        library.soppu_attend(ctypes.byref(job), int(k.dtype == torch.bfloat16))
        job.q = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(compiled.library(_SOURCE, flags=("-fno-math-errno",))))
    except (NotCompiled, OSError) as why:
        _LOG.warning("attention is not compiled, and slower for long texts: %s", why)
        return None
