"""The bases that a client was sent: on its own disk, each sent once, and taken for what its hash says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from soppu import files
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis
from soppu.errors import AdapterError, FederationError

_ID = re.compile(r"u-[0-9a-f]{16}")


@dataclass(frozen=True)
class BasisCache:
    """Those below one folder, where a client keeps its state."""

    root: str

    def find(self, basis_id: str) -> CoreBasis | None:
        """A basis that came before; None where it has not, or its copy here is damaged.

        Raises:
            FederationError: `basis_id`, which a server says, is no name of a basis.
        """
        try:
            found = basis_file.read(self._path(basis_id))
        except AdapterError:
            return None
        return found if found.id == basis_id else None

    def keep(self, basis_id: str, data: bytes) -> CoreBasis:
        """Write down the bytes of a basis' file that came, and read it.

        Raises:
            FederationError: it is another basis than the server names, or none; nothing is kept.
            StorageError: the disk refused it.
        """
        try:
            with files.atomic_path(self._path(basis_id)) as arrived:
                arrived.write_bytes(data)
                found = basis_file.read(arrived)
                if found.id != basis_id:
                    raise AdapterError(f"it is basis {found.id}")
        except AdapterError as error:
            raise FederationError(f"the server named basis {basis_id} and sent another: {error}") from None
        return found

    def _path(self, basis_id: str) -> Path:
        if not _ID.fullmatch(basis_id):
            raise FederationError(f"the server names basis {basis_id!r}; expected u- and 16 hex digits")
        return Path(self.root) / "bases" / f"{basis_id}.safetensors"
