"""Directory: the names a server answers to, and the row of cores behind each. Not the tensors: `resident`.

A bundle is staged, may be activated, and is retired; the row numbers of a bundle are its own for as long as
the server runs, so a request always finishes on the version it was resolved to.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from soppu.compress.bundle.bundle import Bundle
from soppu.errors import AdapterError, BundleError
from soppu.serve.names import find_version


@dataclass(frozen=True)
class Found:
    """What a name means now: `row` in the tables, `version` for caches, `label` to show."""

    label: str
    row: int
    version: str


@dataclass(eq=False)
class Version:
    """One bundle: its first row, and the spare rows that runtime adapters have taken."""

    bundle: Bundle
    start: int
    spare: int
    taken: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        """One past its last row, spare ones included."""
        return self.start + len(self.bundle.users) + self.spare

    def free(self, busy: Collection[int]) -> int:
        """A spare row that no adapter has and no request is on; 0 if there is none."""
        first = self.start + len(self.bundle.users)
        return next((row for row in range(first, self.end) if row not in self.taken | set(busy)), 0)


@dataclass(frozen=True)
class Runtime:
    """An adapter that was loaded beside the bundle's users, on the bundle's basis."""

    bundle_id: str
    row: int
    content_hash: str
    rank: int
    verified: bool
    error: float


class Directory:
    """Every method may be called from any thread."""

    def __init__(self, *, spare: int) -> None:
        self.active = ""
        self._spare = spare
        self._next = 1  # row 0 is the base model
        self._lock = threading.RLock()
        self._versions: dict[str, Version] = {}
        self._adapters: dict[str, Runtime] = {}
        self._users: dict[str, dict[str, int]] = {}

    def versions(self) -> dict[str, Version]:
        """Bundle id -> version, in the order they were staged."""
        with self._lock:
            return dict(self._versions)

    def bundles(self) -> dict[str, tuple[str, ...]]:
        """Bundle id -> its users."""
        return {bundle_id: version.bundle.users for bundle_id, version in self.versions().items()}

    def adapters(self) -> dict[str, Runtime]:
        """Name -> runtime adapter."""
        with self._lock:
            return dict(self._adapters)

    def names(self) -> tuple[str, ...]:
        """Every plain name that is answered now: users of the active bundle, then runtime adapters."""
        with self._lock:
            return (*self._users.get(self.active, ()), *self._adapters)

    def reserve(self, bundle: Bundle) -> int:
        """Take row numbers for a bundle that is about to be staged; its first row."""
        with self._lock:
            start = self._next
            self._next += len(bundle.users) + self._spare
            return start

    def stage(self, bundle: Bundle, bundle_id: str, start: int) -> None:
        """Answer to "user@<bundle id>" from now on."""
        with self._lock:
            self._versions[bundle_id] = Version(bundle, start, self._spare)
            self._users[bundle_id] = {user: start + place for place, user in enumerate(bundle.users)}

    def activate(self, bundle_id: str) -> str:
        """Answer to plain user names from this bundle, "" from none; the one that was active before.

        Raises:
            BundleError: it is not staged, or a user has the name of a runtime adapter.
        """
        with self._lock:
            if bundle_id:
                self._version(bundle_id)
                if clash := sorted(self._users[bundle_id].keys() & self._adapters.keys()):
                    raise BundleError(
                        f"bundle {bundle_id[:12]}: user {clash[0]!r} has the name of a loaded adapter;"
                        " unload that adapter first"
                    )
            previous, self.active = self.active, bundle_id
            return previous

    def retire(self, bundle_id: str) -> Version:
        """Forget the names of a bundle; its rows stay until no request is on them.

        Raises:
            BundleError: it is active, not staged, or runtime adapters are on its basis.
        """
        with self._lock:
            version = self._version(bundle_id)
            if bundle_id == self.active:
                raise BundleError(f"bundle {bundle_id[:12]} is active; activate another one first")
            if held := sorted(n for n, a in self._adapters.items() if a.bundle_id == bundle_id):
                raise BundleError(
                    f"bundle {bundle_id[:12]}: adapter {held[0]!r} is served on its basis; unload it first"
                )
            del self._users[bundle_id], self._versions[bundle_id]
            return version

    def take(self, name: str, adapter: Runtime) -> None:
        """Answer to a runtime adapter's name; one of that name gives its row back."""
        with self._lock:
            old = self._adapters.get(name)
            self._version(adapter.bundle_id).taken.add(adapter.row)
            self._adapters[name] = adapter
            if old is not None:
                self._versions[old.bundle_id].taken.discard(old.row)

    def remove(self, name: str) -> None:
        """Forget a runtime adapter. AdapterError if there is none of that name."""
        with self._lock:
            if name not in self._adapters:
                what = (
                    "a user of the active bundle" if name in self._users.get(self.active, ()) else "unknown"
                )
                raise AdapterError(
                    f"no adapter {name!r} is loaded ({what}); {len(self._adapters)} adapters are loaded"
                )
            adapter = self._adapters.pop(name)
            self._versions[adapter.bundle_id].taken.discard(adapter.row)

    def resolve(self, name: str) -> Found | None:
        """What a name means now; None if nothing.

        "alice" is a runtime adapter or a user of the active bundle; "alice@<bundle id>", or a prefix that
        only one staged bundle has, is alice there, active or not.
        """
        with self._lock:
            if name in self._adapters:
                adapter = self._adapters[name]
                return Found(name, adapter.row, adapter.content_hash)
            row = self._users.get(self.active, {}).get(name, 0)
            if row:
                return Found(name, row, self.active)
            user, _, found = find_version(name, self._versions)
            row = self._users[found[0]].get(user, 0) if len(found) == 1 else 0
            return Found(f"{user}@{found[0]}", row, found[0]) if row else None

    def is_current(self, row: int, version: str) -> bool:
        """Whether a row that was resolved earlier still means the same: False once it was dropped."""
        with self._lock:
            if version in self._versions:
                return True
            return any(a.row == row and a.content_hash == version for a in self._adapters.values())

    def _version(self, bundle_id: str) -> Version:
        if bundle_id not in self._versions:
            raise BundleError(f"bundle {bundle_id[:12]!r} is not loaded; there are {len(self._versions)}")
        return self._versions[bundle_id]
