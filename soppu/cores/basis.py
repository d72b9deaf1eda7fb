"""CoreBasis: the directions of every module that users share, and the id that tells bases apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from soppu.adapter import hash_of
from soppu.base_identity import Base


@dataclass(frozen=True, eq=False)
class CoreBasis:
    """U (o, k_out) and V (i, k_in) of every module that has both; they need not be orthonormal."""

    sides: Mapping[str, tuple[Tensor, Tensor]]  # by full-model module name
    base_model: str = ""
    base_hash: str = ""
    fan_in_fan_out: bool = False
    _id: str = field(default="", init=False, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the basis knows it."""
        return Base(self.base_model, self.base_hash)

    @property
    def id(self) -> str:
        """u- and 16 hex digits of the SHA-256 over base hash, weight layout, and every number. O(size)."""
        if not self._id:
            head = f"soppu-basis-1\n{self.base_hash}\n{self.fan_in_fan_out}\n"
            sides = ((name, zip("UV", self.sides[name], strict=True)) for name in sorted(self.sides))
            named = ((f"{name}.{side}", tensor) for name, both in sides for side, tensor in both)
            object.__setattr__(self, "_id", f"u-{hash_of(head, named)[:16]}")
        return self._id

    def core_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (k_out, k_in)."""
        return {name: (int(u.shape[1]), int(v.shape[1])) for name, (u, v) in self.sides.items()}

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (o, i)."""
        return {name: (int(u.shape[0]), int(v.shape[0])) for name, (u, v) in self.sides.items()}
