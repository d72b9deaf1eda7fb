"""Which number format a machine decodes fastest in: measured, as instruction sets do not tell."""

from __future__ import annotations

import logging
import time

import torch

from soppu.models import DTYPES
from soppu.serve.layers.packed_linear import PackedLinear

_LOG = logging.getLogger(__name__)
_CANDIDATES = ("float32", "bfloat16")
_ROWS, _WIDTH, _LAYERS, _ROUNDS = 16, 1024, 8, 5


def fastest_dtype(device: str) -> str:
    """The faster of float32 and bfloat16 for products shaped as in decoding. About 0.2 seconds on a CPU.

    The choice and both times are logged. With equal times float32 wins.
    """
    seconds = {dtype: _seconds(dtype, device) for dtype in _CANDIDATES}
    chosen = min(_CANDIDATES, key=lambda dtype: seconds[dtype])
    told = ", ".join(f"{dtype} {1e3 * taken:.2f} ms" for dtype, taken in seconds.items())
    _LOG.info("dtype auto: %s (%d products of %d rows: %s)", chosen, _LAYERS, _ROWS, told)
    return chosen


@torch.inference_mode()
def _seconds(dtype: str, device: str) -> float:
    """The best of a few rounds through more weights than the processor's caches hold."""
    kind = DTYPES[dtype]
    layers = [PackedLinear(torch.ones(_WIDTH, _WIDTH, dtype=kind, device=device)) for _ in range(_LAYERS)]
    x = torch.ones(_ROWS, _WIDTH, dtype=kind, device=device)
    taken = []
    for _ in range(_ROUNDS + 1):  # the first round warms up
        begun = time.perf_counter()
        for layer in layers:
            layer(x)
        float(layers[-1](x)[0, 0])  # waits for an asynchronous device
        taken.append(time.perf_counter() - begun)
    return min(taken)
