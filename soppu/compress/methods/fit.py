"""Fit: what every method gives back, and Question: what the default method is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import Page
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.options import Target


@dataclass(frozen=True, eq=False)
class Fit:
    """A compressed fleet.

    Attributes:
        bases: module -> output and input basis of every cluster; all clusters of a module have the same
        ranks. cluster: (n,) int64 whose bases a user's coordinates refer to. pages: all users, in order.
        squared: (modules, n) float64 squared Frobenius errors as stored. certificates: module -> what a
        shared basis of this rank can do at all. steps: module -> alternations made. numbers: how many
        numbers bases and components hold. storage: how they are kept, in words.
    """

    bases: Mapping[str, tuple[Bases, ...]]
    cluster: Tensor
    pages: tuple[Page, ...]
    squared: Tensor
    certificates: Mapping[str, Certificate]
    steps: Mapping[str, int]
    numbers: int
    storage: str


@dataclass(frozen=True, eq=False)
class Question:
    """What `fit` is to make of a fleet.

    Attributes:
        target: how small or how exact.
        most_rank: largest rank of a shared basis; 0 is the method "svd".
        widths: widths own numbers may have.
        seed: of the sketches.
        size_of: bytes of the file a fit would become.
    """

    target: Target
    most_rank: int
    widths: tuple[int, ...]
    seed: int
    size_of: Callable[[Fit], int]
