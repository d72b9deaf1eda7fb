"""The fleets that serving is measured with: users of the embedded base model, by shape and by method.

    qv30       q and v of all 30 layers
    pipeline   q, v, o and down of the last 4 layers, as our pipeline trains
    cores      random cores of one basis, k = 16: speed does not ask what they mean
    residual   the default method, at 16x
    joint      one core a user, at 16x
    study      users of the study of personal forms, in the smallest form that keeps the gain (`served_study`)

Compressed are a few unrelated adapters of rank 16 (`fleets`): the other users have another name, a row and
a record of their own, and the same numbers again. `folders` reconstructs some users as PEFT adapters, for
servers that know nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import served_study
from benchmarks.fleets import Fleet, FleetSpec
from benchmarks.record import ROOT
from soppu import adapter, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.numbers.quantise import AXIS
from tests.soppu.compress.handmade import Plan, make

LAYERS, RANK = 30, 16
SHAPES = {
    f"model.layers.{layer}.self_attn.{leaf}": (o, 576)
    for layer in range(LAYERS)
    for leaf, o in (("q_proj", 576), ("v_proj", 192))
}
PIPELINE = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS - 4, LAYERS)
    for name, shape in (
        ("self_attn.q_proj", (576, 576)),
        ("self_attn.v_proj", (192, 576)),
        ("self_attn.o_proj", (576, 576)),
        ("mlp.down_proj", (576, 1536)),
    )
}
FORMS = {"qv30": SHAPES, "pipeline": PIPELINE}
METHODS = ("residual", "joint", "cores", "study")
RATIO, DISTINCT = 16.0, 48
_STRENGTH = 6.0  # of a user's change: enough to change a text, too little to leave a 16-bit range


@dataclass(frozen=True)
class Served:
    """A fleet on disk: the base model, its bundle, and PEFT folders of some of the users."""

    base: models.BaseModel
    bundle: Bundle
    path: Path
    folders: tuple[Path, ...]
    quality: Mapping[str, Any] | None = None  # of its users, where they were trained


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


@dataclass(frozen=True)
class Kind:
    """Which fleet: a key of FORMS, one of METHODS."""

    shape: str = "qv30"
    method: str = "cores"


def compressed(kind: Kind, users: int, *, seed: int = 0) -> Bundle:
    """A bundle by one of the methods. Minutes for q and v of all layers."""
    spec = FleetSpec(
        n=min(users, DISTINCT), r=RANK, shapes=FORMS[kind.shape], seed=seed, norm_median=_STRENGTH
    )
    options = CompressOptions(method=kind.method, ratio=RATIO, device="cpu")
    found = base()
    made = replace(compress(Fleet(spec), options), base_hash=found.hash, base_model="smollm2-135m")
    return many(made, users)


def many(bundle: Bundle, users: int) -> Bundle:
    """The bundle's users again and again under other names, page by page, so at least `users` of them."""
    n = len(bundle.users)
    times = -(-users // n)
    names = tuple(f"{user}-{number}" for number in range(times) for user in bundle.users)
    pages = [replace(page, first=page.first + n * number) for number in range(times) for page in bundle.pages]
    report = bundle.report
    whose = dict(zip(names, bundle.users * times, strict=True))
    return replace(
        bundle,
        users=names,
        adapter_ids=tuple(f"a-{name}" for name in names),
        ranks=bundle.ranks.repeat(1, times),
        cluster=bundle.cluster.repeat(times),
        norm=bundle.norm.repeat(times),
        pages=tuple(pages),
        report=replace(
            report,
            relative_error={name: report.relative_error[user] for name, user in whose.items()},
            module_error={
                module: {name: errors[user] for name, user in whose.items() if user in errors}
                for module, errors in report.module_error.items()
            },
        ),
        _last={},
    )


def write(folder: Path, *, users: int, folders: int, seed: int = 0, kind: Kind | None = None) -> Served:
    """Write the bundle, and PEFT folders of its first `folders` users in bfloat16."""
    kind, quality = kind or Kind(), None
    if kind.method == "study":
        found = served_study.studied()
        made, quality = many(replace(found.bundle, base_model="smollm2-135m"), users), found.told
    elif kind.method == "cores" and kind.shape == "qv30":
        made = bundle(users, seed=seed)
    else:
        made = compressed(kind, users, seed=seed)
    path = folder / "served.soppu"
    made.save(path)
    kept = []
    for user in made.users[:folders]:
        kept.append(folder / "peft" / user)
        adapter.write(_halved(made.reconstruct(user)), kept[-1])
    return Served(base(), made, path, tuple(kept), quality)


def _halved(whole: LoraAdapter) -> LoraAdapter:
    pairs = {name: LoraPair(A=one.A.bfloat16(), B=one.B.bfloat16()) for name, one in whole.pairs.items()}
    return replace(whole, pairs=pairs)
