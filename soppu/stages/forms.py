"""What users of a run train: adapters of their own, or cores in a basis; and of whose adapters that is made.

The choice is made as a run is prepared, and kept beside its training: runs of equal training share it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from soppu import config as configuration
from soppu import files
from soppu.config import Config
from soppu.federation import chosen_basis
from soppu.federation.chosen_basis import COHORT, ChosenBasis
from soppu.federation.simulation import FEDERATE, LEARN
from soppu.stages.run import CONFIG, FEDERATION, Run

CORES = "cores.toml"


@dataclass(frozen=True)
class Part:
    """One federation of a run: its settings, the file that hands them over, its work folder."""

    config: Config
    path: Path
    workdir: Path
    task: str = FEDERATE  # of the ServerApp

    def write(self) -> None:
        """Have the file say what the settings are. Raises StorageError."""
        files.write_text(self.path, configuration.dump(self.config))


def has_cohort(run: Run) -> bool:
    """Whether some users of the run train adapters first, of which the basis of the others is made."""
    return bool(chosen(run).cohort)


def chosen(run: Run) -> ChosenBasis:
    """The basis of a run; an empty choice where users train adapters."""
    return chosen_basis.read(run.folder / FEDERATION) or ChosenBasis()


def main_part(run: Run) -> Part:
    """The federation whose result is the run's."""
    folder = run.folder / FEDERATION
    if run.config.federation.form == "lora":
        return Part(run.config, run.folder / CONFIG, folder)
    cohort = set() if run.config.federation.around_shared else set(chosen(run).cohort)
    others = tuple(user for user in run.config.data.users if user not in cohort)
    part = Part(_with(run.config, others, form="core"), folder / CORES, folder)
    part.write()
    return part


def cohort_part(run: Run) -> Part:
    """The federation in which the cohort trains adapters: one as any other, of these users alone.

    Where the basis is around the shared one, nobody trains an adapter of their own; where it is learnt, they
    all do that together, after their shared rounds.
    """
    users, settings = chosen(run).cohort, run.config.federation
    least = min(settings.min_users, len(users))
    mode = "shared" if settings.around_shared else settings.mode
    task = LEARN if settings.basis_of == "learnt" else FEDERATE
    folder = run.folder / FEDERATION / COHORT
    config = _with(run.config, users, form="lora", mode=mode, min_users=least)
    part = Part(config, folder / CONFIG, folder, task)
    part.write()
    return part


def _with(config: Config, users: tuple[str, ...], **federation: object) -> Config:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, users=users),
        federation=dataclasses.replace(config.federation, **federation),  # type: ignore[arg-type]
    )
