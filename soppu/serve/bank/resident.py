"""Residents: what is read at its first use, and kept by its last use within a bound.

PEFT folders, and the users of bundles. What reading one means, and what it weighs, is the caller's affair.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from soppu.serve.refusals import overloaded

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
L = TypeVar("L")
DEFAULT_RESIDENT = 1 << 30  # bytes of bundles' users
OVERHEAD = 2048  # bytes of a user in memory beside the user's numbers
_READERS = 2  # threads that read
_MAX_UNREAD = 128  # different ones that may wait to be read; one more is refused with 429
_RESTS = 4  # times as long as it reads: how long who reads ahead rests
_STANDS_BACK = 0.02  # seconds, while others wait for theirs


@dataclass(eq=False)
class _Resident(Generic[V]):
    value: V
    weight: int
    # what requests hold while they run: what somebody uses takes its memory anyway, so it stays
    leases: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


@dataclass(frozen=True)
class Figures:
    """What a table holds now, and what it has done: all figures are of one moment."""

    count: int = 0
    weight: int = 0
    limit: int = 0
    used: int = 0  # of `count`, those that somebody uses
    uses: int = 0  # leases given
    reads: int = 0  # begun
    failures: int = 0
    evictions: int = 0


class Residents(Generic[K, V]):
    """At most `limit` of weight, and those beyond that are in use. Callable from any thread.

    Each is read once, however many ask for it meanwhile; who asks after a failure has it read again. Nothing
    that is in use is let go: an owner of a lease, the object that `take` gave, is who uses it.
    """

    def __init__(
        self,
        read: Callable[[K], V],
        *,
        limit: int,
        weigh: Callable[[V], int] | None = None,
        most_unread: int | None = None,
    ) -> None:
        """`read` is called with a key, in a thread of the table; what it raises, whoever asked gets.

        Args:
            weigh: what counts against `limit`; by default every one weighs 1.
            most_unread: how many may wait to be read.
        """
        self._read, self._weigh = read, weigh or (lambda _: 1)
        self._limit, self._most_unread = limit, most_unread
        self._residents: OrderedDict[K, _Resident[V]] = OrderedDict()  # least recently used first
        self._unread: dict[K, Future[_Resident[V]]] = {}
        self._awaited = Counter[K]()  # how many wait in `take` for one that is being read: it is in use
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="soppu-reader")
        self._weight = self._uses = self._reads = self._failures = self._evictions = 0

    def values(self) -> dict[K, V]:
        """Key -> what is loaded now, least recently used first."""
        with self._lock:
            return {key: resident.value for key, resident in self._residents.items()}

    def __contains__(self, key: K) -> bool:
        return key in self._residents

    def figures(self) -> Figures:
        """What there is now. O(count)."""
        with self._lock:
            used = sum(1 for resident in self._residents.values() if resident.leases)
            done = self._uses, self._reads, self._failures, self._evictions
            return Figures(len(self._residents), self._weight, self._limit, used, *done)

    def reading(self, key: K) -> Future[Any] | None:
        """Have it read; None where it is there. Never blocks: for who cannot wait in `take`.

        Raises:
            RequestError: 429, too many wait to be read.
        """
        with self._lock:
            return None if key in self._residents else self._start(key)

    def take(self, key: K, lease: Callable[[V], L]) -> L:
        """What `lease` makes of the value, which stays while that lives; read now where it is not loaded.

        Raises:
            RequestError: 429, too many wait to be read; and what reading it raises.
        """
        return self.take_all([key], lease)[0]

    def take_all(self, keys: Sequence[K], lease: Callable[[V], L]) -> list[L]:
        """As `take`, for all of them; what is not loaded is read side by side."""
        made, waiting = dict[int, L](), list[tuple[int, K, Future[_Resident[V]]]]()
        try:
            with self._lock:
                for place, key in enumerate(keys):
                    if resident := self._residents.get(key):
                        made[place] = self._lease(resident, lease)
                        self._used(key)
                    else:
                        waiting.append((place, key, self._start(key)))
                        self._awaited[key] += 1
            for place, _, future in waiting:
                resident = future.result()
                with self._lock:
                    made[place] = self._lease(resident, lease)
        finally:
            with self._lock:
                self._awaited -= Counter(key for _, key, _ in waiting)
        return [made[place] for place in range(len(keys))]

    def _lease(self, resident: _Resident[V], make: Callable[[V], L]) -> L:
        self._uses += 1
        made = make(resident.value)
        resident.leases.add(made)
        return made

    def read_ahead(self, keys: Iterable[K], wanted: Callable[[], bool]) -> threading.Thread:
        """Read these before anybody asks, one after the other, until one more might have no room.

        In a thread of its own, which works a fifth of the time, and not while others wait for theirs.

        Args:
            wanted: whether to go on; asked before each, with the table locked.
        """
        thread = threading.Thread(
            target=self._read_ahead, args=(keys, wanted), name="soppu-ahead", daemon=True
        )
        thread.start()
        return thread

    def _read_ahead(self, keys: Iterable[K], wanted: Callable[[], bool]) -> None:
        heaviest = 0
        for key in keys:
            while True:
                with self._lock:
                    if not wanted() or self._weight + heaviest >= self._limit:
                        return
                    if not self._unread:
                        future = None if key in self._residents else self._start(key)
                        break
                time.sleep(_STANDS_BACK)
            if future is not None:
                began = time.monotonic()
                with suppress(Exception):  # who asks for that one is told
                    heaviest = max(heaviest, future.result().weight)
                time.sleep(_RESTS * (time.monotonic() - began))

    def forget(self, which: Callable[[K], bool]) -> None:
        """Let go of all these, and of those of them that are being read; who uses one keeps it."""
        with self._lock:
            self._unread = {key: future for key, future in self._unread.items() if not which(key)}
            for key in [key for key in self._residents if which(key)]:
                self._drop(key)

    def _start(self, key: K) -> Future[_Resident[V]]:
        if key not in self._unread:
            if len(self._unread) >= (self._most_unread or _MAX_UNREAD):
                raise overloaded()
            self._reads += 1
            self._unread[key] = self._readers.submit(self._load, key)
        return self._unread[key]

    def _load(self, key: K) -> _Resident[V]:
        try:
            value = self._read(key)
            resident = _Resident(value, self._weigh(value))
            with self._lock:
                if key in self._unread and key not in self._residents:
                    self._residents[key] = resident
                    self._weight += resident.weight
                    self._used(key)
            return resident
        except BaseException:
            with self._lock:
                self._failures += 1
            raise
        finally:
            with self._lock:
                self._unread.pop(key, None)

    def trim(self) -> None:
        """Let go of what is over the limit: what was in use may be in use no more."""
        with self._lock:
            self._make_room()

    def _used(self, key: K) -> None:
        """Make it the most recently used, and let go of others beyond the limit, the oldest first."""
        self._residents.move_to_end(key)
        self._make_room(keep=key)

    def _make_room(self, keep: K | None = None) -> None:
        if (over := self._weight - self._limit) <= 0:
            return
        chosen = []
        for key, held in self._residents.items():
            if not held.leases and key != keep and key not in self._awaited:
                chosen.append(key)
                if (over := over - held.weight) <= 0:
                    break
        for key in chosen:
            self._drop(key)
            self._evictions += 1

    def _drop(self, key: K) -> None:
        self._weight -= self._residents.pop(key).weight
