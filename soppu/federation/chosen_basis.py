"""Which basis a run's cores are told in: chosen once, and kept in the run's work folder.

What is in force changes while runs last; an attempt that goes on has to go on in the same basis.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from soppu import files

FILE = "basis.json"
COHORT = "cohort"  # the work folder of the cohort's own federation, inside the run's


@dataclass(frozen=True)
class ChosenBasis:
    """The choice.

    Attributes:
        basis_id: "" as long as the cohort's has not been made.
        cohort: the users whose adapters it is made of; none where it was in force before.
        adapters, served: of the cohort: the cores that their adapters became, and what serves each best.
    """

    basis_id: str = ""
    cohort: tuple[str, ...] = ()
    adapters: dict[str, str] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Into a work folder, atomically. Raises StorageError."""
        files.write_text(folder / FILE, json.dumps(asdict(self), indent=2))


def read(folder: Path) -> ChosenBasis | None:
    """What was chosen; None if nothing was yet."""
    path = folder / FILE
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    return ChosenBasis(**told | {"cohort": tuple(told["cohort"])})
