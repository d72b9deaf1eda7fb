"""Stage: the federated rounds, and the freezing of what came back into a set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import soppu
from soppu import adapter as adapters
from soppu import base_identity, files, models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.cores import folder as core_folder
from soppu.cores.core import CoreAdapter
from soppu.errors import FederationError, RegistryError
from soppu.federation import connection, emulator, memory, simulation
from soppu.federation.chosen_basis import COHORT
from soppu.federation.emulator import LayerPlan
from soppu.federation.personalise import BASE, PERSONAL, SHARED
from soppu.models import BaseModel
from soppu.progress import telling
from soppu.registry import Registry
from soppu.stages import forms, text
from soppu.stages.run import FEDERATION, Run, open_run
from soppu.user_ids import is_id

RESULT = f"{FEDERATION}/{simulation.RESULT}"


def federate(run_folder: str, *, on_progress: telling.Tell | None = None) -> str:
    """Run the federation, simulated or on a connection, until every user's adapter is in the registry.

    An attempt that was interrupted goes on after its last finished round, and adapters that a run with
    the same training left in the registry are taken as they are. Returns the federation's id: a hash of
    who got which adapter.

    Raises:
        FederationError: it did not come to an end, or too few users answered.
        DataError: a user's text has changed since the run was prepared.
        ConfigError: this machine has not the memory or the GPUs for it.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, "federate", on_progress=on_progress) as tell:
        return _federated(run, forms.main_part(run), tell)


def federate_cohort(run_folder: str, *, on_progress: telling.Tell | None = None) -> str:
    """Likewise for the users whose adapters a basis is to be made of; returns the id of their federation."""
    run = open_run(run_folder)
    with telling.stage(run.folder, COHORT, on_progress=on_progress) as tell:
        return _federated(run, forms.cohort_part(run), tell)


def _federated(run: Run, part: forms.Part, tell: telling.Tell) -> str:
    text.check_unchanged(run.config.data, run.read(text.FILE))
    with files.exclusive(part.workdir / "lock"):  # a run with equal training may be at it
        path = part.workdir / simulation.RESULT
        result = json.loads(path.read_text()) if path.exists() else {}
        if not (result and _enough(result, part.config) and _all_held(run.registry(), result["adapters"])):
            result = _train(part, run.base(), tell)
        return id_of(result)


def _train(part: forms.Part, base: BaseModel, tell: telling.Tell) -> dict[str, Any]:
    """Where the configuration says: in processes of our own, or on the nodes of a connection."""
    app, settings = Path(soppu.__file__).resolve().parents[1], part.config.federation
    if settings.connection:
        remote = connection.Remote(
            app, settings.connection, part.path, part.workdir, task=part.task, timeout_s=settings.timeout_s
        )
        return connection.run(remote, on_progress=tell)
    check_memory(part.config, base)
    of_cores = settings.form == "core"
    wanted = simulation.Simulation(
        app=app,
        config=part.path,
        workdir=part.workdir,
        users=memory.core_nodes(part.config) if of_cores else len(part.config.data.users),
        client_cpus=settings.client_cpus,
        client_gpus=settings.client_gpus,
        timeout_s=settings.timeout_s,
        task=part.task,
    )
    return simulation.run(wanted, on_progress=tell)


def check_memory(config: Config, base: BaseModel) -> None:
    """Refuse a simulation that this machine cannot hold. ConfigError names the keys to change."""
    model = models.skeleton(base)
    plan = emulator.configured_plan(config, model, base_hash=base.hash)
    memory.check(config, model, plan)


def collect(run_folder: str, federation_id: str) -> str:
    """Check every adapter of a federation, make current what serves each user best, and freeze it as a set.

    Of its own users the set holds exactly what this federation chose for them, whatever another run puts
    meanwhile: their own adapter, the one that all share, or, where the base model is best, nothing.
    Users who took no part keep the adapter they have: a bundle without them would end their service; who was
    left out for want of text and has none gets the shared one. Returns the set's id.

    Raises:
        FederationError: the run folder holds the result of another federation, or an adapter serves nobody.
        RegistryError: an adapter is gone or damaged: its user was forgotten meanwhile, for one.
        AdapterError: an adapter does not fit the base model.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, "collect"):
        return _collect(run, federation_id)


def _collect(run: Run, federation_id: str) -> str:
    result = run.read(RESULT)
    found = id_of(result)
    if found != federation_id:
        raise FederationError(f"{run.folder}: holds federation {found}, asked for {federation_id}")
    registry, base = run.registry(), run.base()
    plan = LayerPlan.from_json(result["plan"]["json"])
    shapes = emulator.target_shapes(models.skeleton(base), plan)
    for user, adapter_id in result["adapters"].items():
        adapter = registry.get_adapter(adapter_id)
        who = f"user {user!r}"
        adapters.validate(adapter, who=who)
        base_identity.check(adapter.base, base.base, who=who, whose="this run is for")
        adapters.check_shapes(adapter, shapes, who=who)
    served = result["served"] | _newcomers(run, result["served"], known=registry.current_set(base=base.base))
    chosen = {user: held for user, held in result["adapters"].items() if served[user] == PERSONAL}
    if sharing := [user for user, what in served.items() if what == SHARED]:
        shared = _common(run, result)
        chosen |= {user: registry.put_adapter(shared, user=user, run=run.id) for user in sharing}
    without = [user for user, what in served.items() if what == BASE]
    if not chosen and not registry.current_set(base=base.base).keys() - set(without):
        raise FederationError(
            f"the base model is best for all {len(without)} users, on text they did not train on: there is"
            " nothing to publish; train longer (federation.rounds, local_steps, personal_steps), with another"
            " step size, or on more text"
        )
    return registry.freeze_current(base.base, chosen=chosen, without=without, run=run.id)


def _common(run: Run, result: Mapping[str, Any]) -> LoraAdapter | CoreAdapter:
    """What serves whom the shared adapter serves best: that, or what a core can tell of it."""
    folder = run.folder / FEDERATION
    if "shared_core" in result:
        return core_folder.read(folder / result["shared_core"])
    return adapters.read(folder / result["shared"])


def _newcomers(run: Run, served: Mapping[str, str], *, known: Collection[str]) -> dict[str, str]:
    """Who was left out for their text and has no adapter yet: they are served the shared one, if an adapter
    serves most of the others best; else the base model, as anybody without a name.
    """
    gain = [what for what in served.values() if what != BASE]
    if len(gain) * 2 <= len(served):
        return {}
    left_out = run.read(text.FILE).get("left_out", {})
    return dict.fromkeys((user for user in left_out if is_id(user) and user not in known), SHARED)


def shared_adapter(run: Run) -> LoraAdapter | None:
    """The adapter that the users of a run's federation averaged; None where no federation has ended.

    Raises:
        AdapterError: the folder is damaged.
    """
    result = run.read(RESULT)
    if not result:
        return None
    return adapters.read(run.folder / FEDERATION / result["shared"])


def freeze_current(run_folder: str) -> str:
    """Freeze every user's current adapter at one instant: where a recompression starts. Returns the set's id.

    Raises:
        FederationError: the registry holds no adapter of this base model.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, "collect"):
        registry, base = run.registry(), run.base()
        if not registry.current_set(base=base.base):
            raise FederationError(
                f"{run.config.registry.root}: no user has an adapter for base model {run.config.base.model!r}"
                f" ({len(registry.current_set())} for others); run the full pipeline first"
            )
        return registry.freeze_current(base.base)


def id_of(result: Mapping[str, Any]) -> str:
    """Names the result of a federation: a hash of who got which adapter."""
    pairs = json.dumps(sorted(result.get("adapters", {}).items()))
    return f"f-{hashlib.sha256(pairs.encode()).hexdigest()[:16]}"


def _enough(result: dict[str, Any], config: Config) -> bool:
    """Whether a result found is enough for this run: an earlier one may have asked for fewer users."""
    if config.federation.min_users:
        return len(result["adapters"]) >= config.federation.min_users
    if not (rounds := result.get("rounds")):
        return True
    last = rounds[-1]  # who was heard and refused has had their say
    return set(config.data.users) <= result["adapters"].keys() | (last["refused"].keys() - last["lost"])


def _all_held(registry: Registry, adapters: dict[str, str]) -> bool:
    """Whether every user still holds the adapter: nobody was forgotten, the registry was not wiped."""
    try:
        return all(user in registry.owner(adapter_id) for user, adapter_id in adapters.items())
    except RegistryError:
        return False
