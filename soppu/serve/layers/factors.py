"""Slots: where the layers of one model find a user's tensors. Made from bundles in `bank.from_bundle`.

A bundle's users share one mapping of modules; a user's slot is a place in it. At each module a user is served
through the bases of the user's cluster, or by a record of the user's own numbers, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.serve.layers.kernels import Basis, Kernel, Sides
from soppu.serve.layers.packed_linear import PackedLinear
from soppu.serve.layers.records import Records, unpack


@dataclass(frozen=True, eq=False)
class Stack:
    """The cores of m users at M modules in one tensor, so that a batch's are gathered once for all of them.

    The modules have cores of one shape, and their users are in the same places.
    """

    P: Tensor  # (M, m, k_out, c), see `SharedFactors`
    Q: Tensor | None  # (M, m, c, k_in)
    # of modules of this stack that share an input; filled by `Routing`
    bases: dict[tuple[object, ...], Bases] = field(default_factory=dict)
    together: dict[tuple[object, ...], Basis] = field(default_factory=dict)  # as the kernel reads them
    kernel: Kernel | None = None  # what adds full cores; None where torch's own products do


@dataclass(frozen=True, eq=False)
class Bases:
    """The bases of M modules that share an input, as two products."""

    V: PackedLinear  # input (m, i) -> (m, M k_in)
    U: PackedLinear  # (m, M k_out) -> (m, o) outputs of all layers of that input, 0 where no module is theirs


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """What m users of one cluster change at one module: D = U P_m Q_m V^T, norms and gains folded into P."""

    U: Tensor  # (o, k_out) output basis of the cluster
    V: Tensor  # (i, k_in) input basis of the cluster
    P: Tensor  # (m, k_out, c) left core factors; the full cores (m, k_out, k_in) where Q is None
    Q: Tensor | None  # (m, c, k_in) right core factors
    stack: Stack | None = None  # what P and Q are a part of; None where they stand alone
    number: int = 0  # their place in it


@dataclass(frozen=True, eq=False)
class OwnNumbers:
    """Records of users who have numbers of their own at one module, and the bases these refer to."""

    records: Records  # of all modules
    module: int  # whose number in them this is
    # cluster -> U (o, k_out) and V (i, k_in) where somebody's record has coordinates on that side
    bases: Mapping[int, Sides]
    kernel: Kernel | None = None  # what adds them; None where they are widened into pairs
    like: Tensor = field(default_factory=lambda: torch.zeros(0))  # of the layer's type, on its device
    # of modules that share an input, this one the first of them; filled by `Routing`
    together: dict[tuple[object, ...], Basis] = field(default_factory=dict)

    def pair(self, index: int, cluster: int = 0) -> LoraPair | None:
        """One user's record as a LoRA pair; None where the user has none here. O(c (o + i) k)."""
        part = unpack(self.records, index, self.module)
        if part is None:
            return None
        left, right = part.p * part.left[:, None], part.q * part.right[:, None]
        U, V = self.bases.get(cluster, (None, None))
        if U is not None:
            left += part.a @ U.mT.float().cpu()
        if V is not None:
            right += part.b @ V.mT.float().cpu()
        # weights are shared evenly: no factor leaves a 16-bit range
        root = (left.norm(dim=1) / right.norm(dim=1).clamp(min=1e-30)).sqrt()[:, None].clamp(1e-15, 1e15)
        return LoraPair(A=(right * root).to(self.like), B=(left / root).mT.contiguous().to(self.like))


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """Everything the n users of a bundle change at one module."""

    shared: Mapping[int, SharedFactors]  # cluster -> its bases and cores, where it serves a user here
    place: Tensor  # (n,) int64 place of every user in the cores of the user's cluster; -1 where there is none
    own: OwnNumbers | None  # records of those who have numbers of their own here; None where nobody has
    bases: Mapping[int, Sides] = field(default_factory=dict)  # cluster -> those that are kept


@dataclass(frozen=True, eq=False)
class Numbers:
    """One user's numbers where they do not lie in tables of all users."""

    cores: tuple[Tensor | None, ...]  # for each kind of modules of a `frame.Frame` (M, k_out, k_in)
    record: Records  # of this one user

    @property
    def size(self) -> int:
        """Bytes."""
        held = (self.record.data, *(core for core in self.cores if core is not None))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True, eq=False)
class BundleSlot:
    """One user of one loaded bundle. Holding the slot keeps that version's tensors alive, and the user's."""

    modules: Mapping[str, ModuleFactors]
    index: int  # the user's place in the bundle, or in the tables of the modules where `numbers` is None
    cluster: int = 0
    numbers: Numbers | None = None


@dataclass(frozen=True, eq=False)
class PairSlot:
    """One loaded LoRA adapter: module name -> (A, B) on the model's device, in its dtype."""

    pairs: Mapping[str, LoraPair]


Slot = BundleSlot | PairSlot
