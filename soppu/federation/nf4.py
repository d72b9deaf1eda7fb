"""Frozen linear layers in 4 bits, by bitsandbytes: NF4 with doubly quantised scales, as in QLoRA.

Products are computed in the dtype of the input, with weights that are widened for the length of one product,
and gradients pass through to the input. On the CPU as on CUDA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from soppu.errors import MissingExtra, UnsupportedModel

NF4 = "nf4"


class Nf4Linear(nn.Module):
    """Stands for an `nn.Linear`. About 4.13 bits a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._library = _bitsandbytes()
        packed, self._state = self._library.functional.quantize_4bit(
            linear.weight.detach().contiguous(), quant_type=NF4, compress_statistics=True
        )
        self.register_buffer("weight", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., o) for inputs (..., i), in the dtype of `x`."""
        return self._library.matmul_4bit(x, self.weight, quant_state=self._state, bias=self.bias)


def quantise(layer: nn.Module) -> None:
    """Put 4-bit layers in place of all linear ones below `layer`. Their weights are let go of one by one.

    Raises:
        UnsupportedModel: it holds weights in another kind of layer.
        MissingExtra: bitsandbytes is not installed.
    """
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            layer.set_submodule(name, Nf4Linear(module))
        elif (weight := getattr(module, "weight", None)) is not None and weight.ndim == 2:
            kind = type(module).__name__
            raise UnsupportedModel(
                f"frozen_dtype = 'nf4': {name} is a {kind}, only Linear is quantised; allowed for this model:"
                " float32, bfloat16"
            )


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # noqa: PLC0415
    except ImportError:
        raise MissingExtra("frozen_dtype = 'nf4'", package="bitsandbytes", extra=NF4) from None
    return bitsandbytes
