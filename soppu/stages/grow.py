"""Stage: a basis that is due for a refit gets the directions in which its probes lie outside it.

Nobody is trained. Whose core is told in the old basis is told exactly in the new one; a probe becomes the
core that it is in the new one, where that serves its user better.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from soppu import files
from soppu.adapter import LoraAdapter
from soppu.basis_settings import BasisConfig
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.cores.grown import grown
from soppu.cores.projecting import Projected, from_lora
from soppu.module_names import lowest_layer
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages.bench import Bench, with_text
from soppu.stages.run import Run, open_run

STAGE = "refit"
FILE = "refit.json"  # in the run folder: what became of which set
_log = logging.getLogger(__name__)


def wanted(run_folder: str, evaluation: str) -> bool:
    """Whether an evaluation found a refit due that the configuration asks for, and the basis may grow."""
    run = open_run(run_folder)
    found, settings = run.read(evaluation).get("basis"), run.config.basis
    if settings.refit != "grow" or not found or not found["due"]:
        return False
    if why := _why_not(run.registry().get_basis(found["basis_id"]), len(found["probes"]), settings):
        _log.warning("basis %s is due for a refit and does not grow: %s", found["basis_id"], why)
    return not why


def refitted(run_folder: str, set_id: str) -> str:
    """The set that a refit of this run made of a set; the set itself where there was none."""
    noted = open_run(run_folder).read(FILE)
    return str(noted["set"]) if noted.get("of_set") == set_id else set_id


def refit(run_folder: str, set_id: str, evaluation: str, *, on_progress: Tell | None = None) -> str:
    """Grow the basis of an evaluation, put it in force; returns the set that is to be compressed in it.

    Idempotent: what a killed attempt left is found, and a basis that was put in force meanwhile stays so.

    Raises:
        RegistryError: the basis or a probe is gone or damaged.
        AdapterError: a probe is of other shapes than the basis.
    """
    run = open_run(run_folder)
    with (
        telling.stage(run.folder, STAGE, on_progress=on_progress) as tell,
        files.exclusive(run.folder / f"{STAGE}.lock"),
    ):
        noted = run.read(FILE)
        if noted.get("of_set") != set_id:
            noted = _made(run, set_id, run.read(evaluation)["basis"])
            run.write(FILE, noted)
        registry = run.registry()
        if registry.current_basis(run.base().base) == noted["from"]:
            registry.use_basis(noted["basis"])
        more = ", ".join(sorted(noted["probes"])) or "nobody"
        became = (
            f"has grown to {noted['basis']}" if noted["basis"] != noted["from"] else "has all of its probes"
        )
        tell({"note": f"{noted['from']} {became}; told anew: {more}", "share": 1.0})
        return str(noted["set"])


def grown_from(run: Run, basis_id: str) -> str:
    """The basis that this run has grown one from, "" where it has not."""
    noted = run.read(FILE)
    return str(noted["from"]) if noted.get("basis") == basis_id != noted["from"] else ""


def _made(run: Run, set_id: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The grown basis, stored, and the set in which probes that win are cores of it."""
    registry, settings = run.registry(), run.config.basis
    old = registry.get_basis(found["basis_id"])
    free = {one["user"]: registry.get_adapter(one["adapter_id"]) for one in found["probes"]}
    new = grown(old, list(free.values()), by=min(settings.grow_by, settings.max_rank - _widest(old)))
    registry.put_basis(new)
    if start := registry.get_start(old.id):
        registry.put_start(new.id, start)
    members = registry.get_set(set_id)
    gained = [
        one["user"] for one in found["probes"] if one["gain"] is not None and one["gain"] > one["core_gain"]
    ]
    won = _that_win(run, members, {user: free[user] for user in gained if user in members}, new)
    for user, placed in won.items():
        metrics = {"carried_error": placed.error}
        members[user] = registry.put_adapter(placed.core, user=user, run=run.id, metrics=metrics)
    return {
        "of_set": set_id,
        "set": registry.freeze(members),
        "from": old.id,
        "basis": new.id,
        "cores": {name: list(shape) for name, shape in new.core_shapes().items()},
        "probes": {user: placed.error for user, placed in won.items()},  # relative errors in the new basis
    }


def _that_win(
    run: Run, members: Mapping[str, str], free: Mapping[str, LoraAdapter], new: CoreBasis
) -> dict[str, Projected]:
    """User -> the core that their probe is in the new basis, where it serves them better than what they have.

    A basis may still be too narrow for a probe, so what that gains freely does not decide: each is measured
    as the core that it would be. O(their text) on the full model.
    """
    texts, found = with_text(run.config, free), dict[str, Projected]()
    if not texts:
        return found
    registry, bench = run.registry(), Bench(run, layers=lowest_layer(new.sides))
    for user, text in texts.items():
        placed = from_lora(free[user], new, who=f"user {user!r}")
        told = CoreInBasis(placed.core, new, who=f"user {user!r}").to_lora()
        each = bench.measure(text.heldout, {"told": told, "has": registry.get_adapter(members[user])})
        if each.mean("told") < each.mean("has"):
            found[user] = placed
    return found


def _why_not(basis: CoreBasis, probes: int, settings: BasisConfig) -> str:
    """What keeps a basis from growing; nothing if it may."""
    if probes < settings.min_probes:
        return f"{probes} of the {settings.min_probes} probes that there have to be (basis.min_probes)"
    if (widest := _widest(basis)) >= settings.max_rank:
        return f"it has {widest} directions, basis.max_rank = {settings.max_rank}; fit one anew"
    return ""


def _widest(basis: CoreBasis) -> int:
    return max(max(shape) for shape in basis.core_shapes().values())
