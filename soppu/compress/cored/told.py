"""What is known of all users together once they are coded, and the report of their bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.cored.batch import CodedBatch
from soppu.compress.cored.kept import KeptBasis
from soppu.compress.cored.rows import EXACT
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.errors import LOST, relative_errors
from soppu.compress.options import CompressOptions
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter
from soppu.errors import BundleError

METHOD = "cores"  # in a report, where a fit has the name of its method


@dataclass(eq=False)
class Totals:
    """Users so far: a few numbers of each at a module."""

    users: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    numbers: int = 0  # in what was given
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    def add(
        self, coded: CodedBatch, some: Mapping[str, LoraAdapter | CoreAdapter], ids: Mapping[str, str] | None
    ) -> None:
        """The users of the next batch; their components are not kept here."""
        self.users.extend(some)
        self.ids.extend(ids[user] if ids else _id(one) for user, one in some.items())
        self.numbers += sum(one.parameters() for one in some.values())
        self.batches.append({name: value for name, value in vars(coded).items() if name != "parts"})

    def joined(self, name: str) -> Tensor:
        """One field of all batches, users in a row."""
        return torch.cat([one[name] for one in self.batches], -1)


def report_of(
    totals: Totals, kept: KeptBasis, basis: CoreBasis, options: CompressOptions, *, numbers: int
) -> CompressionReport:
    """The report of a bundle. BundleError if nothing is left of anybody who had anything."""
    norm, norms, squared = (totals.joined(name) for name in ("norm", "norms", "squared"))
    errors = relative_errors(squared.sum(0) + totals.joined("outside"), norm)
    if bool((norm > 0).any()) and bool((errors >= LOST)[norm > 0].all()):
        raise BundleError(
            f"nothing of {totals.users[0]} and {len(totals.users) - 1} more would be left: the basis spans"
            " nothing of their change; compress them by a method that fits a basis"
        )
    modules = list(kept.sides)
    basis_bits = EXACT if kept.is_exactly(basis) else options.basis_bits
    tables = relative_errors(squared, norms)
    has = totals.joined("ranks") > 0
    share = torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(torch.float64).tiny).square(), 0.0)
    left, whole = (squared * share).sum(1).tolist(), (norms.square() * share).sum(1).tolist()
    return CompressionReport(
        method=METHOD,
        rank=max(max(u.shape[1], v.shape[1]) for u, v in kept.sides.values()),
        clusters=1,
        target="",
        whitened=False,
        seed=options.seed,
        device="cpu",
        storage=f"basis {basis.id} {_bits(basis_bits)}, cores {_bits(options.core_bits)}",
        parameters_before=totals.numbers,
        parameters_after=numbers + kept.numbers,
        seconds=0.0,
        k_used={name: max(u.shape[1], v.shape[1]) for name, (u, v) in kept.sides.items()},
        steps=dict.fromkeys(modules, 0),
        relative_error=dict(zip(totals.users, errors.tolist(), strict=True)),
        module_error={
            name: {user: e for user, e, there in zip(totals.users, row, held, strict=True) if there}
            for name, row, held in zip(modules, tables.tolist(), has.tolist(), strict=True)
        },
        certificates={
            # given, not fitted: nothing is known of the best basis of its rank
            name: Certificate(0.0, error, size, size)
            for name, error, size in zip(modules, left, whole, strict=True)
        },
    )


def _id(one: LoraAdapter | CoreAdapter) -> str:
    return one.id if isinstance(one, CoreAdapter) else f"a-{one.content_hash()[:16]}"


def _bits(bits: int) -> str:
    return f"float{bits}" if bits >= 16 else f"int{bits}"
