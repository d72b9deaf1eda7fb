"""What is published, as notes in a registry's store: for servers that follow it and know no catalogue.

    published/<16 hex of target and URL>.json     the bundle that was switched to last there

The catalogue decides; `Registry.record_publication` writes the note in the same transaction.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from soppu import files
from soppu.blobs import Blobs
from soppu.errors import RegistryError

_FOLDER = "published"


class Pointer(BaseModel, strict=True, frozen=True):
    """One target's publication in force."""

    bundle_id: str
    target: str
    url: str
    at: str  # UTC ISO of one width: it sorts as text
    format: Literal[1] = 1

    @property
    def mark(self) -> str:
        """Tells this publication from any other, one of the same bundle included."""
        return f"{self.at} {self.bundle_id}"


def write(blobs: Blobs, pointer: Pointer) -> None:
    """Say what a target serves from now on. StorageError if the store refuses it."""
    place = f"{pointer.target} {pointer.url.rstrip('/')}"
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    blobs.write(f"{_FOLDER}/{name}.json", pointer.model_dump_json())


def newest(blobs: Blobs, url: str = "") -> Pointer | None:
    """The last publication to any target, or to the one at `url`; None if there was none.

    Raises:
        RegistryError: the store cannot be read, or a note in it is none of this format.
    """
    try:
        pointers = [Pointer.model_validate_json(note) for note in blobs.notes(_FOLDER)]
    except ValidationError as error:
        what = "a note is not of format 1; a newer SOPPU may have written it"
        raise RegistryError(f"{blobs.name}: {_FOLDER}: {what}") from error
    asked = [one for one in pointers if url.rstrip("/") in ("", one.url.rstrip("/"))]
    return max(asked, key=lambda one: one.mark, default=None)


def bundle_key(bundle_id: str) -> str:
    """Where a store keeps a bundle."""
    return f"bundles/{bundle_id}.safetensors"


def bundle_path(blobs: Blobs, bundle_id: str) -> Path:
    """A bundle's file on this machine. RegistryError if it is absent or has another hash. O(size)."""
    return blobs.fetch(bundle_key(bundle_id), partial(check_bundle, bundle_id))


def check_bundle(bundle_id: str, path: Path) -> Path:
    """`path`, if it holds the bundle of this id. RegistryError else."""
    if (found := files.sha256_file(path)) != bundle_id:
        raise RegistryError(f"bundle {bundle_id}: its stored copy is damaged: sha256 {found}")
    return path
