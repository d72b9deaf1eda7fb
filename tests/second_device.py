"""A second device on a machine without one: its tensors are the CPU's, and say that they are not.

What mixes them with the CPU's fails as on a GPU, so a forgotten `.to(device)` fails where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# a type of torch's that has no kernels of its own here, and whose gradients are computed in this thread
_DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default, _aten._local_scalar_dense.default}


class Elsewhere(Tensor):
    """A tensor of the second device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=_DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
    there = [item for item in given if isinstance(item, Elsewhere)]
    # as in torch: a number may come from the CPU, and a mask of the CPU may index
    indexing = func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
    here = [item for item in given if not isinstance(item, Elsewhere) and item.dim() and not indexing]
    if there and here and func not in _MOVES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found lazy:0 and cpu")
    if indexing and not isinstance(args[0], Elsewhere) and there:
        raise RuntimeError(f"{func}: indices of lazy:0 into a tensor of the cpu")
    if func is _aten._fused_sdp_choice.default:
        return 0  # plain products: the CPU's fused kernel is the CPU's alone
    wanted = kwargs.get("device")
    away = torch.device(wanted).type == _DEVICE.type if wanted is not None else bool(there)
    moved = {**kwargs, "device": torch.device("cpu")} if wanted is not None and away else kwargs
    inner = tree_map(lambda item: item.inner if isinstance(item, Elsewhere) else item, (args, moved))
    out = func(*inner[0], **inner[1])
    if func is _aten.copy_.default or (args and func._schema.name.endswith("_") and out is inner[0][0]):
        return args[0]  # in place: the same tensor, wherever it is
    return tree_map(lambda item: Elsewhere(item) if away and isinstance(item, Tensor) else item, out)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """`lazy:0` for the length of a with-block."""
    with _Device():
        yield _DEVICE
