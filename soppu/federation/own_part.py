"""What a client remembers of its user between rounds: the part of the adapter that never leaves.

One folder a run and user, one file a round, so that a round which is asked for again, after the server or the
client was killed, begins where it began before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from soppu import files
from soppu.errors import FederationError

_FILE = re.compile(r"round-(\d+)\.safetensors")
_RUN = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class OwnPart:
    """That of one user in one run."""

    folder: Path

    @classmethod
    def of(cls, root: str, *, run: str, user: str) -> OwnPart:
        """Below `root`; FederationError if `run`, which a server says, is no name of a run."""
        if not _RUN.fullmatch(run):
            raise FederationError(f"the server says this is run {run!r}; expected 8 to 64 hexadecimal digits")
        return cls(Path(root) / run / f"user-{quote(user, safe='')}")

    def recall(self, *, before: int) -> tuple[int, dict[str, Tensor]]:
        """(Round, tensors) of the last round before this one that the user took part in; (0, {}) if none.

        Raises:
            FederationError: the file is damaged.
        """
        last = max((number for number in self._rounds() if number < before), default=0)
        try:
            return last, load_file(self._path(last)) if last else {}
        except (SafetensorError, OSError) as error:
            raise FederationError(
                f"{self._path(last)}: cannot be read: {error}; delete it, and this user's own part goes on"
                " from an earlier round, or begins anew"
            ) from None

    def keep(self, number: int, state: dict[str, Tensor]) -> None:
        """Write what round `number` ended with. Of others the one before it stays; later ones are of a run
        that was begun again.

        Raises:
            StorageError: the disk refused it; what was there is still there.
        """
        files.write_bytes(self._path(number), save(state), mode=0o600)
        before = [other for other in self._rounds() if other < number]
        for other in self._rounds():
            if other > number or other < max(before, default=0):
                self._path(other).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    def _rounds(self) -> list[int]:
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return [int(match[1]) for path in names if (match := _FILE.fullmatch(path.name))]
