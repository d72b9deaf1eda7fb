"""The fleet that serving is measured with: q and v of every layer of the embedded base, k = 16, random users.

A bundle is put together from random cores, for speed does not ask what they mean; `folders` reconstructs some
of its users as PEFT adapters, for servers that know nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import ROOT
from soppu import adapter, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle
from soppu.compress.numbers.quantise import AXIS
from tests.soppu.compress.handmade import Plan, make

LAYERS, RANK = 30, 16
SHAPES = {
    f"model.layers.{layer}.self_attn.{leaf}": (o, 576)
    for layer in range(LAYERS)
    for leaf, o in (("q_proj", 576), ("v_proj", 192))
}
_STRENGTH = 6.0  # of a user's change: enough to change a text, too little to leave a 16-bit range


@dataclass(frozen=True)
class Served:
    """A fleet on disk: the base model, its bundle, and PEFT folders of some of the users."""

    base: models.BaseModel
    bundle: Bundle
    path: Path
    folders: tuple[Path, ...]


def base() -> models.BaseModel:
    """The embedded base model."""
    return models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")


def bundle(users: int, *, seed: int = 0) -> Bundle:
    """A bundle of full random cores in one basis a module; orthonormal but for the rounding to 8 bits."""
    forms = [[(AXIS, 0, 8, 0)] * RANK] * users
    made = make(Plan(forms, SHAPES, k=(RANK, RANK), widths=(8, 8)), seed=seed)
    found = base()
    norm = _STRENGTH * torch.ones(users) / RANK
    return replace(made, norm=norm, base_hash=found.hash, base_model="smollm2-135m")


def write(folder: Path, *, users: int, folders: int, seed: int = 0) -> Served:
    """Write the bundle, and PEFT folders of its first `folders` users in bfloat16."""
    made = bundle(users, seed=seed)
    path = folder / "served.soppu"
    made.save(path)
    kept = []
    for user in made.users[:folders]:
        kept.append(folder / "peft" / user)
        adapter.write(_halved(made.reconstruct(user)), kept[-1])
    return Served(base(), made, path, tuple(kept))


def _halved(whole: LoraAdapter) -> LoraAdapter:
    pairs = {name: LoraPair(A=one.A.bfloat16(), B=one.B.bfloat16()) for name, one in whole.pairs.items()}
    return replace(whole, pairs=pairs)
