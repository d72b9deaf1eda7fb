"""A thousand users at the study's quality: the cores of its unseen users, as a bundle stores and serves them.

The form is the smallest of ours that keeps 95 % of the full LoRA's gain over shared, by personal.json. Who
trained in it is compressed with nothing fitted, measured as stored, and repeated under other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from benchmarks import personal_arms as arms
from benchmarks.personal import ground_of, own_of, stored
from benchmarks.personal_arms import Arm
from benchmarks.personal_front import smallest
from benchmarks.personal_ground import Ground
from soppu.compress import Bundle, CompressOptions
from soppu.compress.cored.run import compress_cores
from soppu.cores.around import around, with_own
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora

CORPUS = "stdlib"


@dataclass(frozen=True)
class Studied:
    """Users of the study in one bundle, and what a row of serving says of their quality."""

    bundle: Bundle
    told: Mapping[str, Any]


def studied(*, bits: int = 8) -> Studied:
    """The form's users, their numbers in `bits`. ClickException where no form keeps as much."""
    row = smallest([one for one in stored()["rows"] if one["corpus"] == CORPUS])
    if row is None:
        raise click.ClickException(f"no form of {CORPUS} in personal.json keeps 95 % of the full LoRA's gain")
    arm = Arm(row["arm"], row["k"], row["own"], row["basis_users"], tuple(row["modules"]))
    made, losses = bundle_of(arm, ground_of(CORPUS), bits=bits)
    kept = {
        name: row[name] for name in ("corpus", "k", "users", "gain", "interval", "kept", "numbers", "mean")
    }
    return Studied(made, kept | {"arm": str(arm), "bits": bits, "mean_stored": sum(losses) / len(losses)})


def bundle_of(arm: Arm, ground: Ground, *, bits: int) -> tuple[Bundle, list[float]]:
    """The reported users of an arm as `user0`, `user1` and so on, and the loss of each as stored.

    What stands beside the shared adapter is told in a basis around it.
    """
    held, people = own_of(arm, ground), ground.roles.reported
    placed = [arms.core_of(arm, ground, held[who.id]) for who in people]
    if arm.name != arms.CORE:
        placed = _around(placed, ground)
    members = {f"user{n}": one.core for n, one in enumerate(placed)}
    options = CompressOptions(basis_bits=bits, core_bits=bits, device="cpu")
    made = compress_cores(members, placed[0].basis, options)
    return made, [
        ground.plain.judged(ground.text(who).heldout, made.reconstruct(name))
        for who, name in zip(people, members, strict=True)
    ]


def _around(beside: Sequence[CoreInBasis], ground: Ground) -> list[CoreInBasis]:
    """The shared adapter and each of the cores beside it as one core."""
    basis = around(ground.shared, beside[0].basis)
    start = from_lora(ground.shared, basis).core
    placed = []
    for one in beside:
        own = {name: with_own(start.cores[name], core) for name, core in one.core.cores.items()}
        core = replace(start, cores={**start.cores, **own}, own=one.core.own)
        placed.append(CoreInBasis(core, basis))
    return placed
