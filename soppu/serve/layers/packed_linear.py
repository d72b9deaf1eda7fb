"""PackedLinear: a frozen linear layer, its weight kept in oneDNN's fastest layout.

torch converts the layout again in every product of few rows; here it is done once. Where oneDNN cannot
(another device or number format), the product is torch's own.
"""

from __future__ import annotations

import logging
import timeit
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soppu.models import DTYPES

_LOG = logging.getLogger(__name__)
_ROWS = 32  # the number of rows the layout is chosen for; any other works
_DTYPES = {name: DTYPES[name] for name in ("float32", "bfloat16")}
_TRIED_ROWS, _WIDTH, _LAYERS, _ROUNDS = 16, 1024, 8, 5  # of the products that are measured


class PackedLinear:
    """y = x W^T + b, W (o, i) frozen, b (o,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._packed else weight
        self._bias = bias

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> PackedLinear:
        """Layers of one input, with a `weight` (o, i) and a `bias` (o,) or None; outputs side by side."""
        weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator]
        biases = [layer.bias for layer in layers]
        bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(biases, weights, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b.detach() for b, w in pairs])  # type: ignore[operator]
        return cls(weights[0] if len(weights) == 1 else torch.cat(weights), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """(m, i) -> (m, o)."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """(m, i), (m, o) -> y + residual (m, o), a new tensor."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return F.linear(x, self._weight, self._bias).add_(residual)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this weight."""
    if (
        weight.device.type != "cpu"
        or weight.dtype not in _DTYPES.values()
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fastest_dtype(device: str) -> str:
    """The faster of float32 and bfloat16 for products shaped as in decoding. About 0.2 seconds on a CPU.

    Measured, as instruction sets do not tell. Choice and times are logged. With equal times float32 wins.
    """
    seconds = {dtype: _seconds(dtype, device) for dtype in _DTYPES}
    chosen = min(_DTYPES, key=lambda dtype: seconds[dtype])
    told = ", ".join(f"{dtype} {1e3 * taken:.2f} ms" for dtype, taken in seconds.items())
    _LOG.info("dtype auto: %s (%d products of %d rows: %s)", chosen, _LAYERS, _TRIED_ROWS, told)
    return chosen


@torch.inference_mode()
def _seconds(dtype: str, device: str) -> float:
    """The best of a few rounds through more weights than the processor's caches hold."""
    kind = _DTYPES[dtype]
    layers = [PackedLinear(torch.ones(_WIDTH, _WIDTH, dtype=kind, device=device)) for _ in range(_LAYERS)]
    x = torch.ones(_TRIED_ROWS, _WIDTH, dtype=kind, device=device)

    def products() -> None:
        for layer in layers:
            layer(x)
        float(layers[-1](x)[0, 0])  # waits for an asynchronous device

    return min(timeit.repeat(products, number=1, repeat=_ROUNDS + 1))  # the first round warms up
