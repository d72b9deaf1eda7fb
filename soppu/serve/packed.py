"""PackedLinear: frozen linear layers that share an input, as one product in the layout oneDNN is fastest with.

torch lays a weight out anew in every product of few rows; here that is done once. Where oneDNN does not do
it (another device, a number format it lacks), the product is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 32  # the number of rows the layout is chosen for; any other works
_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear:
    """y = x [W_1; W_2; ...]^T + [b_1; b_2; ...] for layers of one input.

    Args:
        layers: `nn.Linear` or anything with such a `weight` (o, i) and `bias` (o,) or None.

    Attributes:
        widths: out-features of every layer.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator]
        self.widths = [weight.shape[0] for weight in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._bias = _biases(layers, weights)
        self._packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._packed else weight

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
    """Whether oneDNN takes this weight in a layout of its own."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _biases(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> Tensor | None:
    given = [layer.bias for layer in layers]
    if all(bias is None for bias in given):
        return None
    return torch.cat(
        [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()  # type: ignore[operator]
            for bias, weight in zip(given, weights, strict=True)
        ]
    )
