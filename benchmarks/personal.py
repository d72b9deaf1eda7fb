"""What a user's own numbers win over one shared adapter, by form and count: benchmarks/results/personal.json.

    python -m benchmarks.personal [--corpus stdlib] [--block 0 --block 1] [--threads 1]

Users whom no part has seen are trained in every arm and measured on text that was held out. Every row is
written down as it is done; one that is there, made of the same text, seed and settings, is not made again, so
that the study can be stopped at any moment and gone on with. Seconds are the processor's, a user's training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import personal_arms as arms
from benchmarks.pages import read_result
from benchmarks.personal_arms import BLOCKS, Arm
from benchmarks.personal_front import compared
from benchmarks.personal_ground import DTYPES, SETTINGS, Base, Ground, Tuned
from benchmarks.personal_users import CORPORA, Sizes
from benchmarks.personal_ways import Way, numbers, size
from benchmarks.record import ROOT, circumstances, store
from soppu import files, models
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.evaluate.report import utc_now

NAME, FOLDER = "personal", ROOT / ".soppu" / "study" / "personal"
_PLACE = ("corpus", "arm", "k", "own", "basis_users", "modules", "epsilon")  # together of one row


def measured(arm: Arm, ground: Ground) -> dict[str, Any]:
    """Train an arm and measure it: its row, but for what it wins over others."""
    losses, told = _fixed(arm, ground) if arm.name in arms.NOT_TRAINED else _trained(arm, ground)
    down = arms.bytes_down(arm, ground)
    return {
        "corpus": ground.corpus,
        "arm": arm.name,
        "k": arm.k,
        "own": arm.own,
        "basis_users": arm.basis_users,
        "modules": list(arm.modules),
        "users": len(losses),
        "mean": sum(losses.values()) / len(losses),
        "bytes_down": size(down) if down else 0,
        **told,
        "losses": losses,
        "compute": ground.base.dtype,
        "key": ground.key(str(arm)),
    }


def _fixed(arm: Arm, ground: Ground) -> tuple[dict[str, float], dict[str, Any]]:
    """Arms that train nobody: what users are given, or what they trained in another arm, told otherwise."""
    given = {
        arms.BASE: lambda: None,
        arms.SHARED: lambda: ground.shared,
        arms.MEAN: lambda: arms.mean_core(arm, ground),
    }
    told: dict[str, Any] = {"numbers": 0, "bytes_up": 0, "seconds": 0.0}
    if arm.name in given:
        one = given[arm.name]()
        return {
            who.id: ground.plain.judged(ground.text(who).heldout, one) for who in ground.roles.reported
        }, told
    basis, losses, errors = arms.basis_of(arm, ground), {}, []
    own = own_of(Arm(arms.FULL), ground)
    for who in ground.roles.reported:
        found = from_lora(ground.adapter(own[who.id]), basis)
        placed = CoreInBasis(found.core, basis)
        losses[who.id] = ground.plain.judged(ground.text(who).heldout, placed.to_lora())
        errors.append(found.error)
        told |= {"numbers": found.core.parameters(), "bytes_up": size(found.core.tensors())}
    return losses, told | {"error": sum(errors) / len(errors)}


def _trained(arm: Arm, ground: Ground) -> tuple[dict[str, float], dict[str, Any]]:
    way = arms.way_of(arm, ground)
    held, tuned, seconds = _run(arm, ground, way)
    for_all, people = arm.name in arms.TRAINED_FOR_ALL, ground.roles.reported
    own = held * len(people) if for_all else held
    losses = {who.id: way.judged(one, ground.text(who).heldout) for who, one in zip(people, own, strict=True)}
    sent = way.sent(held[0])
    told = {"numbers": 0 if for_all else numbers(sent), "bytes_up": size(sent), "seconds": seconds}
    if arm.name == arms.CORE:
        told["start_error"] = from_lora(ground.shared, arms.basis_of(arm, ground)).error
    return losses, told | tuned.to_dict()


def _run(arm: Arm, ground: Ground, way: Way) -> tuple[list[Any], Tuned, float]:
    """What every reported user has, or all together, which is put aside; how, and seconds of each."""
    for_all, people = arm.name in arms.TRAINED_FOR_ALL, ground.roles.reported
    tuned = ground.tuned(str(arm), way, on=[ground.pooled] if for_all else None, first=arms.first_rates(arm))
    texts = [ground.pooled] if for_all else [ground.training(who) for who in people]
    started = time.process_time()
    (held,) = way.run(texts, rate=tuned.rate, marks=[tuned.steps])
    seconds = (time.process_time() - started) / len(texts)
    for who, one in zip(people, held, strict=not for_all):
        ground.keep(ground.key(str(arm)), who.id, way.sent(one))
    return held, tuned, seconds


def own_of(arm: Arm, ground: Ground) -> dict[str, dict[str, Tensor]]:
    """What every reported user sent in an arm; where it is not on this machine it is trained again."""
    key, people = ground.key(str(arm)), ground.roles.reported
    if not all(ground.keeps(key, who.id) for who in people):
        _run(arm, ground, arms.way_of(arm, ground))
    return {who.id: ground.tensors(key, who.id) for who in people}


def stored() -> dict[str, Any]:
    """The file that there is."""
    return read_result(NAME) or {"rows": []}


def of_these_settings(found: dict[str, Any]) -> dict[str, Any]:
    """The same file, or an empty one where it is of other settings: such figures stand in no one table."""
    same = found.get("settings", SETTINGS) == json.loads(json.dumps(dict(SETTINGS)))
    return found if same or not found["rows"] else {"rows": []}


def add(row: Mapping[str, Any], ground: Ground, where: Mapping[str, Any], *, among: str = "rows") -> None:
    """Write a row down beside the others, in place of an older one of the same arm and setting."""
    with files.exclusive(FOLDER / ".lock"):
        found = of_these_settings(stored())
        others = [one for one in found.get(among, []) if _place(one) != _place(row)]
        corpora = found.get("corpora", {})
        corpora[ground.corpus] = corpora.get(ground.corpus, {}) | described(ground)
        told = found | where | {"settings": SETTINGS, "corpora": corpora}
        told[among] = [*others, {**row, "commit": where["commit"], "created": utc_now()}]
        store(NAME, told | {"rows": compared(told["rows"])})


def _place(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(name) or None for name in _PLACE]


def described(ground: Ground) -> dict[str, Any]:
    """A corpus and the users of it, as they are written down."""
    parts = {part: len(getattr(ground.roles, part)) for part in ("basis", "tuned", "reported")}
    told = {"digest": ground.digest, "shared": ground.shared_id, "users": parts}
    told |= {"packages": ground.packages} if ground.packages else {}
    return {**told, "sizes": asdict(ground.sizes), "tokens": len(ground.words.ids)}


def ground_of(corpus: str, *, dtype: str = "", seed: int = 0) -> Ground:
    """What arms of a corpus begin with, as the rows that there are did.

    Args:
        dtype: of the layers in training; if left out that of these rows, or, without any, what is fast here.
    """
    there = [str(row.get("compute", DTYPES[0])) for row in stored()["rows"] if row["corpus"] == corpus]
    dtype = dtype or (there[0] if there else models.dtype_name(models.AUTO))
    ground = Ground(corpus, Sizes(), _base(dtype), folder=FOLDER, seed=seed)
    refuse_other_ground(ground)
    return ground


@lru_cache(maxsize=1)
def _base(dtype: str) -> Base:
    return Base.smollm2(dtype)


def refuse_other_ground(ground: Ground) -> None:
    """ClickException if the file has rows of this corpus that do not stand beside new ones.

    They are of other text, of another machine say; or the layers were of another dtype; or the shared adapter
    was another one, as another processor's rounding makes it: all others begin there.
    """
    told, rows = stored().get("corpora", {}).get(ground.corpus, {}), _rows_of(ground)
    here = f"{NAME}.json has rows of {ground.corpus}"
    away = "take its rows out of the file, or leave the corpus out"
    if (known := told.get("digest", ground.digest)) != ground.digest:
        lacking = sorted({*told.get("packages", ())} - {*ground.packages})
        install = f" install {', '.join(lacking)}," if lacking else ""
        raise click.ClickException(
            f"{here} from other text ({known}, here {ground.digest}): users are not the same on this"
            f" machine;{install} {away}"
        )
    if odd := {row.get("compute", DTYPES[0]) for row in rows} - {ground.base.dtype}:
        raise click.ClickException(
            f"{here} trained in {', '.join(odd)}, this is {ground.base.dtype}: go on with --dtype"
            f" {min(odd)}, or {away}"
        )
    if rows and (known := told.get("shared", ground.shared_id)) != ground.shared_id:
        raise click.ClickException(
            f"{here} that begin at shared adapter {known}, and here it is {ground.shared_id}: bring"
            f" {ground.folder} from where they were made, or {away}"
        )


def _rows_of(ground: Ground) -> list[Mapping[str, Any]]:
    return [row for row in stored()["rows"] if row["corpus"] == ground.corpus]


def study(ground: Ground, chosen: Sequence[Arm], where: Mapping[str, Any]) -> None:
    """Measure the arms that are missing, one after the other.

    Args:
        where: the circumstances that the process began in: files may change below it.
    """
    for row in _rows_of(ground):
        if "tried" in row:
            ground.know(row["key"], row)
    for arm in chosen:
        if any(row["key"] == ground.key(str(arm)) for row in stored()["rows"]):
            continue
        started = time.monotonic()
        row = measured(arm, ground)
        add(row, ground, where)
        click.echo(f"{ground.corpus:10} {arm!s:32} {row['mean']:.4f}  ({time.monotonic() - started:.0f} s)")


@click.command()
@click.option("--corpus", "corpora", multiple=True, default=tuple(CORPORA), type=click.Choice(tuple(CORPORA)))
@click.option("--block", "blocks", multiple=True, type=click.IntRange(0, len(BLOCKS) - 1), help="Of arms.")
@click.option(
    "--dtype", default="", type=click.Choice(("", *DTYPES)), help="Of layers; as rows are, or what is fast."
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def main(corpora: tuple[str, ...], blocks: tuple[int, ...], dtype: str, threads: int, seed: int) -> None:
    """Run what is missing, corpus by corpus, block by block."""
    torch.set_num_threads(threads)
    where = circumstances(seed=seed)
    for corpus in corpora:
        ground = ground_of(corpus, dtype=dtype, seed=seed)
        for block in blocks or range(len(BLOCKS)):
            study(ground, BLOCKS[block], where)


if __name__ == "__main__":
    main()
