"""Stage: what a cohort trained becomes a basis, which is put in force.

It is of their adapters, which become the nearest cores in it; or around the adapter that they share, and they
train cores as everybody does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from soppu import adapter as adapters
from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress import joining
from soppu.config import CompressConfig
from soppu.cores import basis_file
from soppu.cores.around import around
from soppu.cores.basis import CoreBasis, drawn
from soppu.cores.projecting import from_lora
from soppu.errors import FederationError
from soppu.federation import simulation
from soppu.federation.chosen_basis import COHORT
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages import forms
from soppu.stages.compress import compressed
from soppu.stages.federate import id_of
from soppu.stages.run import FEDERATION, Run, open_run

STAGE = "basis"
_RESULT = f"{FEDERATION}/{COHORT}/{simulation.RESULT}"
_EXACT: dict[str, Any] = {"ratio": 0.0, "max_bytes": 0, "max_error": 0.0, "basis_bits": 32, "core_bits": 32}


def make_basis(run_folder: str, cohort: str, *, on_progress: Tell | None = None) -> str:
    """Make the basis, store it, and put it in force; returns its id.

    Of adapters: whoever is in the cohort is served on, by the nearest cores. Idempotent: what a killed
    attempt left is found.

    Args:
        cohort: the id of its federation, which `federate_cohort` gave.

    Raises:
        FederationError: the run folder holds another federation.
        RegistryError: an adapter is gone: its user was forgotten meanwhile.
        AdapterError: the adapters do not go together; no such module as `federation.basis_modules` names.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, STAGE, on_progress=on_progress) as tell:
        result = run.read(_RESULT)
        if (found := id_of(result)) != cohort:
            raise FederationError(f"{run.folder}: its cohort's federation is {found}, asked for {cohort}")
        with files.exclusive(run.folder / FEDERATION / "lock"):
            return _made(run, result, tell)


def settings_of(config: CompressConfig, *, rank: int) -> CompressConfig:
    """How a basis is fitted: jointly and exactly, errors weighed as the run weighs those of its bundles."""
    return replace(config, method="joint", rank=rank, clusters=1, **_EXACT)


def _made(run: Run, result: Mapping[str, Any], tell: Tell) -> str:
    registry, settings = run.registry(), run.config.federation
    of_adapters = settings.basis_of == "adapters"
    members = result["adapters"] if of_adapters else {}
    shared = adapters.read(run.folder / FEDERATION / COHORT / result["shared"])
    if of_adapters:
        wanted = settings_of(run.config.compress, rank=settings.basis_rank)
        basis = joining.basis_of(compressed(run, members, wanted, tell=tell))
    else:
        basis = around(shared, _beside(shared, run, result))
    registry.put_basis(basis)
    registry.put_start(basis.id, shared)
    own, held, errors = settings.core_own_rank, {}, {}
    for number, (user, adapter_id) in enumerate(members.items(), start=1):
        placed = from_lora(registry.get_adapter(adapter_id), basis, own_rank=own, who=f"user {user!r}")
        held[user], errors[user] = registry.put_adapter(placed.core, user=user, run=run.id), placed.error
        tell({"note": f"{user} told in {basis.id}", "share": number / (len(members) + 1)})
    registry.use_basis(basis.id)
    served = {user: result["served"][user] for user in held}
    replace(forms.chosen(run), basis_id=basis.id, adapters=held, served=served).write(run.folder / FEDERATION)
    run.write(f"basis-{basis.id}.json", _told(basis, errors))
    source = f"of {len(members)} users" if of_adapters else "around the shared adapter"
    tell({"note": f"{basis.id} {source} is in force", "share": 1.0})
    return basis.id


def _beside(shared: LoraAdapter, run: Run, result: Mapping[str, Any]) -> CoreBasis:
    """What the cohort has learnt, or directions of nobody's text in the modules that the run names."""
    if "directions" in result:
        return basis_file.read(run.folder / FEDERATION / COHORT / result["directions"])
    settings = run.config.federation
    shapes = {name: (o, i) for name, (o, _, i) in shared.shapes().items()}
    made = drawn(
        shapes,
        settings.basis_rank,
        seed=run.config.seed,
        base_hash=shared.base_hash,
        modules=settings.basis_modules,
    )
    return replace(made, base_model=shared.base_model, fan_in_fan_out=shared.fan_in_fan_out)


def _told(basis: CoreBasis, errors: Mapping[str, float]) -> dict[str, Any]:
    """What the run folder has of it."""
    return {
        "basis": basis.id,
        "bytes": len(basis_file.encode(basis)),
        "cores": {name: list(shape) for name, shape in basis.core_shapes().items()},
        "relative_error": dict(errors),  # of the cohort's adapters, told as cores
    }
