"""Attention of rows that decode, over their blocks where these lie: the kernel of `attention.cpp`."""

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
_POINTERS = ("q", "k", "v", "out", "blocks", "table", "places", "starts")
_NUMBERS = (
    "rows",
    "q_heads",
    "kv_heads",
    "d",
    "q_stride",
    "k_stride",
    "v_stride",
    "table_stride",
    "threads",
)


class _Job(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _NUMBERS]


def runs(dtype: torch.dtype, device: torch.device, d: int) -> bool:
    """Whether the kernel can be had for heads of this size here; the log says why not."""
    if device.type != "cpu" or dtype not in _TYPES or d > _MOST_D:
        return False
    return _library() is not None


class Decoding:
    """One step of one token a row, layer after layer: writes the token's keys and values, and attends."""

    def __init__(self, step: Step, cache: KVCache) -> None:
        self._cache = cache
        self._places = torch.tensor(list(step.rows))
        self._starts = torch.tensor(list(step.starts))
        tables = cache.tables
        self._job = _Job(
            places=self._places.data_ptr(),
            starts=self._starts.data_ptr(),
            rows=len(step.rows),
            table_stride=tables.stride(0),
            threads=torch.get_num_threads(),
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (b, q, d), keys and values (b, kv, d), a row's numbers side by side -> (b, q d)."""
        job, tables = self._job, self._cache.tables
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        job.q, job.k, job.v, job.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        job.blocks = self._cache.store(k).data_ptr()
        job.table = tables.data_ptr() + layer * tables.stride(1) * tables.element_size()
        job.q_heads, job.kv_heads, job.d = q.shape[1], k.shape[1], q.shape[2]
        job.q_stride, job.k_stride, job.v_stride = q.stride(0), k.stride(0), v.stride(0)
        library = _library()
        assert library is not None  # else `runs` says so
        library.soppu_attend(ctypes.byref(job), int(q.dtype == torch.bfloat16))
        return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(compiled.library(_SOURCE, flags=("-fno-math-errno",))))
    except (NotCompiled, OSError) as why:
        _LOG.warning("attention is not compiled, and slower for long texts: %s", why)
        return None
