"""CoreBasis: the directions of every module that users share, and the id that tells bases apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soppu.adapter import hash_of
from soppu.base_identity import Base
from soppu.errors import AdapterError


@dataclass(frozen=True, eq=False)
class CoreBasis:
    """U (o, k_out) and V (i, k_in) of every module that has both; they need not be orthonormal.

    Of every side the first `common` columns tell what all users share: the rows and columns of a core that
    belong to them are everybody's, and nobody trains or sends them.
    """

    sides: Mapping[str, tuple[Tensor, Tensor]]  # by full-model module name
    base_model: str = ""
    base_hash: str = ""
    fan_in_fan_out: bool = False
    common: int = 0
    _hash: str = field(default="", init=False, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the basis knows it."""
        return Base(self.base_model, self.base_hash)

    def content_hash(self) -> str:
        """SHA-256 over base hash, weight layout, what is common, and every number, by name. O(size), once."""
        if not self._hash:
            head = f"soppu-basis-1\n{self.base_hash}\n{self.fan_in_fan_out}\n"
            head += f"common {self.common}\n" if self.common else ""
            object.__setattr__(self, "_hash", hash_of(head, self.tensors().items()))
        return self._hash

    @property
    def id(self) -> str:
        """u- and the first 16 hex digits of the content hash."""
        return f"u-{self.content_hash()[:16]}"

    def tensors(self) -> dict[str, Tensor]:
        """Every number the basis holds: `<module>.U` and `<module>.V`, by module name."""
        return {
            f"{name}.{side}": tensor
            for name in sorted(self.sides)
            for side, tensor in zip("UV", self.sides[name], strict=True)
        }

    def core_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (k_out, k_in)."""
        return {name: (int(u.shape[1]), int(v.shape[1])) for name, (u, v) in self.sides.items()}

    def free_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> rows and columns of a core that are a user's own; (0, 0) where all is in common."""
        free = {n: (out - self.common, inn - self.common) for n, (out, inn) in self.core_shapes().items()}
        return {name: shape if min(shape) > 0 else (0, 0) for name, shape in free.items()}

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (o, i)."""
        return {name: (int(u.shape[0]), int(v.shape[0])) for name, (u, v) in self.sides.items()}


def drawn(
    shapes: Mapping[str, tuple[int, int]],
    k: int,
    *,
    seed: int,
    base_hash: str = "",
    modules: Sequence[str] = (),
) -> CoreBasis:
    """Random orthonormal directions, of nobody's text: at most `k` a side of every module (o, i).

    Columns of Q of a QR of normal numbers, drawn module by module, U before V.

    Args:
        modules: projections that have them, `down_proj` say; all if empty.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = {n: shape for n, shape in shapes.items() if not modules or n.rpartition(".")[2] in modules}

    def side(width: int) -> Tensor:
        return torch.linalg.qr(torch.randn(width, min(k, width), generator=draw))[0].contiguous()

    return CoreBasis({name: (side(o), side(i)) for name, (o, i) in chosen.items()}, base_hash=base_hash)


def orthonormal(basis: CoreBasis) -> CoreBasis:
    """The basis of the same directions, made orthonormal from the first one on. O(k^2 (o + i)) a module."""
    sides = {name: (_orthonormal(u), _orthonormal(v)) for name, (u, v) in basis.sides.items()}
    return replace(basis, sides=sides)


def _orthonormal(side: Tensor) -> Tensor:
    q, r = torch.linalg.qr(side)
    return (q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)).contiguous()  # one that is so stays as it is


def validate(basis: CoreBasis, *, who: str) -> None:
    """Refuse a basis that cores could not be told in.

    Raises:
        AdapterError: no modules, a side that is not a matrix with a column, not float32, or not finite.
    """
    if not basis.sides:
        raise AdapterError(f"{who}: the basis has no modules; compress adapters that share directions")
    for name, tensor in basis.tensors().items():
        if tensor.dim() != 2 or not tensor.numel():
            raise AdapterError(
                f"{who}: {name} is {tuple(tensor.shape)}, allowed: a matrix (features, k >= 1)"
            )
        if tensor.dtype != torch.float32:
            raise AdapterError(f"{who}: {name} is {tensor.dtype}, allowed: torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{who}: {name} holds NaN or Inf; take an earlier basis")
    narrow = min(min(shape) for shape in basis.core_shapes().values())
    if not 0 <= basis.common <= narrow or not any(map(any, basis.free_shapes().values())):
        raise AdapterError(
            f"{who}: common = {basis.common}, allowed: 0 to {narrow}, the fewest directions of a side,"
            " and some module has to have more"
        )
