"""Slots: where the layers of one model find a user's tensors. Made from bundles in `bank.from_bundle`.

A bundle's users share one mapping of modules; a user's slot is a place in it. At each module a user is served
through the bases of the user's cluster, or by a LoRA pair of their own, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from soppu.adapter import LoraPair
from soppu.serve.layers.packed_linear import PackedLinear


@dataclass(frozen=True, eq=False)
class Stack:
    """The cores of m users at M modules in one tensor, so that a batch's are gathered once for all of them.

    The modules have cores of one shape, and their users are in the same places.
    """

    P: Tensor  # (M, m, k_out, c), see `SharedFactors`
    Q: Tensor | None  # (M, m, c, k_in)
    # of modules of this stack that share an input; filled by `Routing`
    bases: dict[tuple[object, ...], Bases] = field(default_factory=dict)


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
class OwnRows:
    """The LoRA pairs of a bundle's users at one module, all users' ranks in one tensor."""

    A: Tensor  # (w, i) rows of all A
    B: Tensor  # (w, o) columns of all B, as rows
    starts: Tensor  # (n + 1,) int64; user n has the rows from starts[n] up to, not including, starts[n + 1]

    def pair(self, index: int) -> LoraPair | None:
        """One user's pair, without a copy; None where the user has none here."""
        start, end = self.starts[index : index + 2].tolist()
        return LoraPair(A=self.A[start:end], B=self.B[start:end].mT) if end > start else None


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """Everything the n users of a bundle change at one module."""

    shared: Mapping[int, SharedFactors]  # cluster -> its bases and cores, where it serves a user here
    place: Tensor  # (n,) int64 place of every user in the cores of the user's cluster; -1 where there is none
    own: OwnRows | None  # pairs of the users who have numbers of their own here; None where nobody has


@dataclass(frozen=True, eq=False)
class BundleSlot:
    """One user of one loaded bundle. Holding the slot keeps that version's tensors alive."""

    modules: Mapping[str, ModuleFactors]
    index: int
    cluster: int = 0


@dataclass(frozen=True, eq=False)
class PairSlot:
    """One loaded LoRA adapter: module name -> (A, B) on the model's device, in its dtype."""

    pairs: Mapping[str, LoraPair]


Slot = BundleSlot | PairSlot
