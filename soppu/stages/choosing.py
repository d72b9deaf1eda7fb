"""Which basis a run's cores will be told in, found out as the run is prepared."""

from __future__ import annotations

import hashlib
from pathlib import Path

from soppu import files, models
from soppu.config import Config
from soppu.errors import ConfigError, RegistryError
from soppu.federation import chosen_basis, emulator
from soppu.federation.chosen_basis import ChosenBasis
from soppu.models import BaseModel
from soppu.registry import Registry


def named(config: Config, base: BaseModel) -> tuple[str, ...]:
    """The id of the basis that a run is named by: its form "core" takes what is in force. () for the others.

    Raises:
        ConfigError: none is in force.
    """
    if config.federation.form != "core":
        return ()
    if found := _registry(config).current_basis(base.base):
        return (found,)
    raise ConfigError(
        f"federation.form = 'core': registry {config.registry.root} has no basis in force for base model"
        f" {config.base.model!r}; a run with federation.form = 'auto' makes one of its cohort's adapters"
    )


def choose(config: Config, base: BaseModel, folder: Path) -> None:
    """Write down what is chosen for a training, once: a later run of it goes on with the same, unless the
    registry has lost it.

    Args:
        folder: the training's.

    Raises:
        ConfigError: the cohort leaves nobody to train a core; the basis asked for cannot be made.
    """
    if config.federation.form == "lora":
        return
    if config.federation.around_shared:
        _check_around(config, base)
    registry = _registry(config)
    with files.exclusive(folder / "choice.lock"):
        found = chosen_basis.read(folder)
        if found and (not found.basis_id or _holds(registry, found.basis_id)):
            return
        in_force = registry.current_basis(base.base)
        ChosenBasis(in_force, () if in_force else cohort(config)).write(folder)


def cohort(config: Config) -> tuple[str, ...]:
    """Who trains adapters first, drawn by the seed; in the order of `data.users`. ConfigError: it is all."""
    users, size = config.data.users, config.federation.cohort
    if size >= len(users):
        raise ConfigError(
            f"federation.cohort = {size}: {len(users)} users take part, and somebody has to be left to train"
            f" a core; allowed here: 2 to {len(users) - 1}"
        )
    drawn = sorted(users, key=lambda user: hashlib.sha256(f"{config.seed} {user}".encode()).digest())[:size]
    return tuple(user for user in users if user in set(drawn))


def _check_around(config: Config, base: BaseModel) -> None:
    """Refuse what the shared adapter will not give, before it is trained."""
    settings = config.federation
    model = models.skeleton(base)
    plan = emulator.configured_plan(config, model, base_hash=base.hash)
    chosen = settings.basis_modules or plan.target_modules
    if odd := [name for name in settings.basis_modules if name not in plan.target_modules]:
        raise ConfigError(
            f"federation.basis_modules = {list(settings.basis_modules)}: {', '.join(odd)} is not adapted;"
            f" allowed: some of {', '.join(plan.target_modules)}, [] for all"
        )
    shapes = emulator.target_shapes(model, plan)
    room = min(min(shape) for name, shape in shapes.items() if name.rpartition(".")[2] in chosen)
    if settings.basis_of == "learnt" and settings.basis_rank > room:
        raise ConfigError(
            f"federation.basis_rank = {settings.basis_rank}: {', '.join(chosen)} have room for {room}"
            f" directions on either side; allowed with basis_of = 'learnt': 1 to {room}"
        )


def _holds(registry: Registry, basis_id: str) -> bool:
    try:
        registry.get_basis(basis_id)
    except RegistryError:
        return False
    return True


def _registry(config: Config) -> Registry:
    return Registry.open(config.registry.root, catalogue=config.registry.catalogue)
