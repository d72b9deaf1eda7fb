"""CoreAdapter: one user's change of a base model, told inside a basis: D = U S V^T, and perhaps + B A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair, hash_of
from soppu.base_identity import Base
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError

_PREFIX = "c-"  # of ids
MOST_OWN = 4  # the rank that a user may have beside the basis: with more, a LoRA is the plainer thing


@dataclass(frozen=True, eq=False)
class CoreAdapter:
    """A core for every module of one basis, and at most rank `MOST_OWN` of the user's own beside it."""

    basis_id: str  # `CoreBasis.id` of the basis that the numbers are told in; without it they mean nothing
    cores: Mapping[str, Tensor]  # S (k_out, k_in), by full-model module name
    own: Mapping[str, LoraPair] = field(default_factory=dict)  # of any of these modules
    base_model: str = ""
    base_hash: str = ""
    fan_in_fan_out: bool = False
    _hash: str = field(default="", init=False, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the core knows it."""
        return Base(self.base_model, self.base_hash)

    def content_hash(self) -> str:
        """SHA-256 over base hash, weight layout, the basis' id, and every number, by name."""
        if not self._hash:
            head = f"soppu-core-1\n{self.base_hash}\n{self.fan_in_fan_out}\n{self.basis_id}\n"
            object.__setattr__(self, "_hash", hash_of(head, sorted(self.tensors().items())))
        return self._hash

    @property
    def id(self) -> str:
        """c- and the first 16 hex digits of the content hash."""
        return f"{_PREFIX}{self.content_hash()[:16]}"

    def tensors(self) -> dict[str, Tensor]:
        """Every number the core holds: `<module>.core`, and `<module>.own_A`, `<module>.own_B`."""
        named = {f"{name}.core": core for name, core in self.cores.items()}
        for name, pair in self.own.items():
            named |= {f"{name}.own_A": pair.A, f"{name}.own_B": pair.B}
        return named

    def parameters(self) -> int:
        """How many numbers the core holds."""
        return sum(tensor.numel() for tensor in self.tensors().values())


@final
@dataclass(frozen=True, eq=False)
class CoreInBasis:
    """A core beside the basis it names: what can be trained, measured and stored.

    Raises:
        AdapterError: the core names another basis, is of another base model or layout, does not fit, is not
            finite float32, or has more of its own than `MOST_OWN`.
    """

    core: CoreAdapter
    basis: CoreBasis
    who: str = "core"  # the user or folder named in messages

    def __post_init__(self) -> None:
        core, basis = self.core, self.basis
        if core.basis_id != basis.id:
            raise AdapterError(
                f"{self.who}: the core is told in basis {core.basis_id}, found basis {basis.id}; carry it"
                " over, or give the bundle it was trained in"
            )
        base_identity.check(core.base, basis.base, who=self.who, whose="the basis is for")
        if core.fan_in_fan_out != basis.fan_in_fan_out:
            raise AdapterError(
                f"{self.who}: fan_in_fan_out is {core.fan_in_fan_out}, the basis has {basis.fan_in_fan_out}"
            )
        _check(core, basis, self.who)

    def to_lora(self) -> LoraAdapter:
        """The same change as an ordinary adapter, exact but for float32's rounding. O((o + i) k^2) a module.

        Its rank is the smaller of k_out and k_in, and what the user has of their own.
        """
        core = self.core
        pairs = {name: self._pair(name) for name in core.cores}
        return LoraAdapter(pairs, core.base_model, core.base_hash, core.fan_in_fan_out)

    def _pair(self, name: str) -> LoraPair:
        (u, v), s = self.basis.sides[name], self.core.cores[name]
        inside = LoraPair(v.mT, u @ s) if s.shape[1] <= s.shape[0] else LoraPair(s @ v.mT, u)
        own = self.core.own.get(name)
        parts = [inside, own] if own else [inside]
        return LoraPair(torch.cat([one.A for one in parts]), torch.cat([one.B for one in parts], 1))


def is_core(adapter_id: str) -> bool:
    """Whether an id in the registry or a bundle is of a core."""
    return adapter_id.startswith(_PREFIX)


def zero(basis: CoreBasis) -> CoreAdapter:
    """The core of the basis that changes nothing."""
    cores = {name: torch.zeros(shape) for name, shape in basis.core_shapes().items()}
    return CoreAdapter(basis.id, cores, {}, basis.base_model, basis.base_hash, basis.fan_in_fan_out)


def _check(core: CoreAdapter, basis: CoreBasis, who: str) -> None:
    if core.cores.keys() != basis.sides.keys():
        odd = min(core.cores.keys() ^ basis.sides.keys())
        there = "the basis has it" if odd in basis.sides else "the basis lacks it"
        raise AdapterError(f"{who}: {odd}: {there}, needed: a core for every module of the basis, no other")
    for name, shape in basis.core_shapes().items():
        if (held := tuple(core.cores[name].shape)) != shape:
            raise AdapterError(f"{who}: {name}: the core is {held}, the basis has room for {shape}")
    shapes = basis.module_shapes()
    for name, pair in core.own.items():
        o, i = shapes.get(name, (0, 0))
        r = pair.A.shape[0] if pair.A.dim() else 0
        if (pair.A.shape, pair.B.shape) != ((r, i), (o, r)) or not 1 <= r <= MOST_OWN:
            found = f"A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}"
            raise AdapterError(
                f"{who}: {name}: of its own the core has {found}, allowed: ranks 1 to {MOST_OWN} of {(o, i)}"
            )
    for name, tensor in core.tensors().items():
        if tensor.dtype != torch.float32:
            raise AdapterError(f"{who}: {name} is {tensor.dtype}, allowed: torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{who}: {name} holds NaN or Inf; take an earlier one")
