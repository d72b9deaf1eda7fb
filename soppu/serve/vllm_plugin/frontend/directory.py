"""Directory: the names a server answers to, and the row of cores behind each. Not the tensors: `resident`.

A bundle is staged, may be activated, and is retired; the row numbers of a bundle are its own for as long as
the server runs, so a request always finishes on the version it was resolved to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soppu.compress.bundle.shelf import Shelf
from soppu.errors import BundleError
from soppu.serve.bank.holdings import BundleUsers, Holder, LoadedAdapter


@dataclass(frozen=True)
class NamedRow:
    """What a name means now: `row` in the tables, `version` for caches, `label` to show."""

    label: str
    row: int
    version: str


@dataclass(frozen=True, eq=False)
class Version:
    """One bundle: its rows, and which of them are spare: those after its users'."""

    bundle: Shelf
    rows: range
    spare: range
    checked: NDArray[np.bool_]  # (users,) whose page was decoded here without an error


@dataclass(frozen=True, eq=False)
class Runtime(LoadedAdapter):
    """An adapter loaded beside the bundle's users, on the bundle's basis: `where` is a spare row."""

    bundle_id: str
    error: float
    folder: str = ""  # where the state keeps it


class Directory(Holder[int, Runtime]):
    """Users by their row, row 0 is the base model. Every method may be called from any thread."""

    def __init__(self, *, spare: int) -> None:
        super().__init__()
        self._spare = spare
        self._next = 1
        self._versions: dict[str, Version] = {}

    def versions(self) -> dict[str, Version]:
        """Bundle id -> version, in the order they were staged."""
        with self._changing:
            return dict(self._versions)

    def names(self) -> tuple[str, ...]:
        """Every plain name that is answered now: users of the active bundle, then runtime adapters."""
        held = self._held
        return (*held.bundles.get(held.active, ()), *held.adapters)

    def reserve(self, bundle: Shelf) -> int:
        """Take row numbers for a bundle that is about to be staged; its first row."""
        with self._changing:
            start = self._next
            self._next += len(bundle.users) + self._spare
            return start

    def stage(self, bundle: Shelf, bundle_id: str, start: int) -> None:
        """Answer to "user@<bundle id>" from now on."""
        with self._changing:
            rows = range(start, start + len(bundle.users) + self._spare)
            self._versions[bundle_id] = Version(
                bundle, rows, spare=rows[len(bundle.users) :], checked=np.zeros(len(bundle.users), np.bool_)
            )
            users = BundleUsers(bundle.users, lambda place: start + place)
            self._become(self._held.stage(bundle_id, users))

    def retire(self, bundle_id: str) -> Version:
        """Forget the names of a bundle; its rows stay until no request is on them.

        Raises:
            BundleError: it is active, not staged, or runtime adapters are on its basis.
        """
        with self._changing:
            held = self._held.drop(bundle_id)
            if on_it := sorted(name for name, a in held.adapters.items() if a.bundle_id == bundle_id):
                raise BundleError(
                    f"bundle {bundle_id[:12]}: adapter {on_it[0]!r} is served on its basis; remove it first"
                )
            self._become(held)
            return self._versions.pop(bundle_id)

    def free_row(self, bundle_id: str, busy: Collection[int]) -> int:
        """A spare row of a bundle that no adapter has and no request is on; 0 if there is none."""
        taken = {a.where for a in self._held.adapters.values()}.union(busy)
        return next((row for row in self._versions[bundle_id].spare if row not in taken), 0)

    def take(self, name: str, adapter: Runtime) -> None:
        """Answer to a runtime adapter's name; one of that name gives its row back."""
        with self._changing:
            self._become(self._held.add(name, adapter))

    def check_name(self, name: str) -> None:
        """Raise AdapterError where a user of the active bundle has the name."""
        self._held.check_name(name)

    def resolve(self, name: str) -> NamedRow | None:
        """What a name means now, see `Holdings.resolve`; None if nothing."""
        resolved = self._held.resolve(name)
        if isinstance(resolved, str):
            return None
        assert resolved.where is not None
        return NamedRow(resolved.adapter_id, resolved.where, resolved.version)

    def unchecked(self, name: str) -> tuple[Version, int] | None:
        """The version and place of a user whose page was not decoded yet; None for everybody else."""
        resolved = self.resolve(name)
        version = self._versions.get(resolved.version) if resolved is not None else None
        if resolved is None or version is None:
            return None
        place = resolved.row - version.rows.start
        return None if version.checked[place] else (version, place)

    def is_current(self, row: int, version: str) -> bool:
        """Whether a row that was resolved earlier still means the same: False once it was dropped."""
        held = self._held
        if version in held.bundles:
            return True
        return any(a.where == row and a.content_hash == version for a in held.adapters.values())
