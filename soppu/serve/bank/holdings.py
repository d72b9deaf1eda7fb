"""What one server answers to: bundles, adapters, and which bundle is active. The vLLM plugin keeps it too.

Where a user's tensors are is the holder's affair: a `Slot` of our own layers, or a row of vLLM's tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.compress.bundle.users import Users
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.serve.names import find_version
from soppu.user_ids import spellings


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One loaded adapter: `where` its tensors are; `verified`: it states this server's base hash."""

    where: Any
    content_hash: str
    rank: int
    verified: bool

    @classmethod
    def of(cls, adapter: LoraAdapter, base: Base, *, where: Any, **own: Any) -> Self:
        """What a listing says about `adapter` on a server of `base`."""
        rank = max(pair.rank for pair in adapter.pairs.values())
        verified = bool(base.hash) and adapter.base_hash == base.hash
        return cls(where, adapter.content_hash(), rank, verified, **own)


S = TypeVar("S")
A = TypeVar("A", bound=LoadedAdapter)


@dataclass(frozen=True, eq=False)
class Resolved(Generic[S]):
    """What an adapter id means now; all empty for the base model."""

    adapter_id: str = ""  # "alice", or "alice@<whole bundle id>" where a version was asked for
    version: str = ""  # the bundle id, or the adapter's content hash
    where: S | None = None  # the tensors are; None is the base model


@dataclass(frozen=True)
class Answer:
    """What a server answers for a user: `loaded` is all that may be asked for now and is the user's."""

    adapter_id: str = ""  # the plain name, which follows what is active; "" where it means nothing now
    version: str = ""  # what that is now
    loaded: tuple[str, ...] = ()  # "alice@<bundle id>" for each loaded bundle with the user, and paths


class BundleUsers(Mapping[str, S]):
    """A bundle's users, found where they are asked for: nothing is made for each of them beforehand."""

    def __init__(self, names: Users, where: Callable[[int], S]) -> None:
        """`where` tells what is behind the user at a place."""
        self.names = names
        self._where = where

    def __getitem__(self, user: str) -> S:
        place = self.names.place(user)
        if place is None:
            raise KeyError(user)
        return self._where(place)

    def __contains__(self, user: object) -> bool:
        return user in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Holdings(Generic[S, A]):
    """Bundle id -> user -> where, name -> adapter, and the active bundle's id. A change is a new one."""

    bundles: Mapping[str, Mapping[str, S]] = field(default_factory=dict)
    adapters: Mapping[str, A] = field(default_factory=dict)
    active: str = ""

    def stage(self, bundle_id: str, users: Mapping[str, S]) -> Holdings[S, A]:
        """With a bundle; one that is there already stays."""
        return replace(self, bundles={**self.bundles, bundle_id: self.bundles.get(bundle_id, users)})

    def activate(self, bundle_id: str) -> Holdings[S, A]:
        """With this bundle active, "" for none. BundleError: not loaded, or a user has an adapter's name."""
        users = self.users(bundle_id) if bundle_id else {}
        if clash := sorted(name for name in self.adapters if name in users):
            raise BundleError(
                f"bundle {bundle_id[:12]}: user {clash[0]!r} has the name of a loaded adapter;"
                " remove that adapter first"
            )
        return replace(self, active=bundle_id)

    def drop(self, bundle_id: str) -> Holdings[S, A]:
        """Without a bundle. BundleError: it is active, or not loaded."""
        self.users(bundle_id)
        if bundle_id == self.active:
            raise BundleError(f"bundle {bundle_id[:12]} is active; activate another one first")
        kept = {known: users for known, users in self.bundles.items() if known != bundle_id}
        return replace(self, bundles=kept)

    def add(self, name: str, adapter: A) -> Holdings[S, A]:
        """With an adapter, in place of one of that name. AdapterError: a user of the active bundle has it."""
        self.check_name(name)
        return replace(self, adapters={**self.adapters, name: adapter})

    def check_name(self, name: str) -> None:
        """Raise AdapterError where a user of the active bundle has the name."""
        if name in self.bundles.get(self.active, ()):
            raise AdapterError(f"{name}: the active bundle {self.active[:12]} has a user of that name")

    def remove(self, name: str) -> Holdings[S, A]:
        """Without an adapter. AdapterError: there is none of that name."""
        if name not in self.adapters:
            what = "a user of the active bundle" if name in self.bundles.get(self.active, ()) else "unknown"
            raise AdapterError(
                f"no adapter {name!r} is loaded ({what}); {len(self.adapters)} adapters are loaded"
            )
        kept = {known: adapter for known, adapter in self.adapters.items() if known != name}
        return replace(self, adapters=kept)

    def users(self, bundle_id: str) -> Mapping[str, S]:
        """User -> where. BundleError: the bundle is not loaded."""
        if bundle_id not in self.bundles:
            raise BundleError(f"bundle {bundle_id[:12]!r} is not loaded; there are {len(self.bundles)}")
        return self.bundles[bundle_id]

    def resolve(self, name: str) -> Resolved[S] | str:
        """What `name` means now, or why it means nothing.

        "alice" is the adapter of that name, or alice in the active bundle; "alice@<bundle id>" (or a prefix
        that only one loaded bundle has) is alice in that bundle, active or not. Users may be asked for by the
        name behind their id: where nobody is "alice@example.com", that is "alice%40example.com".
        """
        found = self._named(name)
        user, prefix, _ = find_version(name, self.bundles)
        others = [*spellings(name)[1:], *(f"{one}@{prefix}" for one in spellings(user)[1:])]
        tried = (self._named(other) for other in others if isinstance(found, str))
        return next((one for one in tried if not isinstance(one, str)), found)

    def _named(self, name: str) -> Resolved[S] | str:
        if name in self.adapters:
            adapter = self.adapters[name]
            return Resolved(name, adapter.content_hash, adapter.where)
        active = self.bundles.get(self.active, {})
        if name in active:
            return Resolved(name, self.active, active[name])
        user, prefix, matches = find_version(name, self.bundles)
        if not prefix:
            where = f"the active bundle is {self.active[:12]}" if self.active else "no bundle is active"
            return f"{where}, {len(self.adapters)} single adapters are loaded"
        if len(matches) != 1:
            return f"{len(matches)} of {len(self.bundles)} loaded bundles begin with {prefix!r}"
        users = self.bundles[matches[0]]
        if user not in users:
            return f"bundle {matches[0][:12]} holds {len(users)} users, not {user!r}"
        return Resolved(f"{user}@{matches[0]}", matches[0], users[user])

    def answers(self, user: str) -> Answer | None:
        """What is answered for a user of bundles, or an adapter's name; None for somebody unknown."""
        told = map(self._answers, spellings(user))
        return next((answer for answer in told if answer), None)

    def _answers(self, user: str) -> Answer | None:
        loaded = tuple(f"{user}@{bundle_id}" for bundle_id, users in self.bundles.items() if user in users)
        if user in self.adapters:
            return Answer(user, self.adapters[user].content_hash, (user, *loaded))
        if user in self.bundles.get(self.active, ()):
            return Answer(user, self.active, loaded)
        return Answer(loaded=loaded) if loaded else None


class Holder(Generic[S, A]):
    """Holdings that change as a whole, one change at a time. Readers need no lock.

    `commit` is called with the holdings to come; where it raises, nothing has changed.
    """

    def __init__(self) -> None:
        self.commit: Callable[[Holdings[S, A]], None] | None = None
        self._held: Holdings[S, A] = Holdings()
        self._changing = threading.RLock()

    @property
    def active(self) -> str:
        """Id of the active bundle, "" if there is none."""
        return self._held.active

    def bundles(self) -> dict[str, Sequence[str]]:
        """Bundle id -> its users, in the order they were loaded. O(bundles): users are found when asked."""
        return {
            bundle_id: users.names if isinstance(users, BundleUsers) else tuple(users)
            for bundle_id, users in self._held.bundles.items()
        }

    def adapters(self) -> dict[str, A]:
        """Name -> loaded adapter."""
        return dict(self._held.adapters)

    def answers(self, user: str) -> Answer | None:
        """What is answered for a user; None for somebody unknown."""
        return self._held.answers(user)

    def activate(self, bundle_id: str) -> str:
        """Serve plain user names from this bundle from now on, "" from none; the one active before.

        Raises:
            BundleError: it is not loaded, or one of its users has the name of a loaded adapter.
        """
        with self._changing:
            previous = self.active
            self._become(self._held.activate(bundle_id))
            return previous

    def check_active(self, expected: str | None) -> None:
        """RequestError 409 where another bundle is active than is expected; None expects nothing."""
        if expected is not None and self.active != expected:
            raise RequestError(
                f"bundle {self.active[:12] or 'none'} is active, not {expected[:12] or 'none'}: somebody has"
                " changed it meanwhile",
                status=409,
                error_type="conflict",
            )

    def remove(self, name: str) -> None:
        """Forget an adapter; requests under way finish on it. AdapterError if it is not there."""
        with self._changing:
            self._become(self._held.remove(name))

    def _become(self, held: Holdings[S, A]) -> None:
        if self.commit is not None:
            self.commit(held)
        self._held = held
