"""PackedLinear: a frozen linear layer, its weight kept in oneDNN's fastest layout.

torch converts the layout again in every product of few rows; here it is done once. Where oneDNN cannot
(another device or number format), the product is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 32  # the number of rows the layout is chosen for; any other works
_DTYPES = (torch.float32, torch.bfloat16)


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
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
