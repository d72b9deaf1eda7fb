"""Residents: adapters read at their first use, a bounded number of them kept, by their last use.

What reading one means is the bank's affair.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from soppu.serve.bank.holdings import LoadedAdapter, Resolved
from soppu.serve.refusals import overloaded

S = TypeVar("S")
_READERS = 2  # threads that read folders
_MAX_UNREAD = 128  # different adapters that may wait to be read; one more is refused with 429


@dataclass(eq=False)
class _Resident(Generic[S]):
    adapter: LoadedAdapter
    # what requests hold while they run: an adapter that somebody uses takes its memory anyway, so it stays
    leases: weakref.WeakSet[Resolved[S]] = field(default_factory=weakref.WeakSet)

    def lease(self, adapter_id: str) -> Resolved[S]:
        resolved: Resolved[S] = Resolved(adapter_id, self.adapter.content_hash, self.adapter.where)
        self.leases.add(resolved)
        return resolved


class Residents(Generic[S]):
    """At most `limit` adapters, and those beyond that running requests are on. Callable from any thread.

    An adapter is read once, however many ask for it meanwhile; who asks after a failure has it read again.
    """

    def __init__(self, read: Callable[[str], LoadedAdapter], *, limit: int) -> None:
        """`read` is called with a name, in a thread of the table; what it raises, whoever asked gets."""
        self._read = read
        self._limit = limit
        self._residents: OrderedDict[str, _Resident[S]] = OrderedDict()  # least recently used first
        self._unread: dict[str, Future[_Resident[S]]] = {}
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="soppu-adapter")

    def adapters(self) -> dict[str, LoadedAdapter]:
        """Name -> what is loaded now, least recently used first."""
        with self._lock:
            return {name: resident.adapter for name, resident in self._residents.items()}

    def reading(self, name: str) -> Future[Any] | None:
        """Have `name` read; None where it is there. Never blocks: for who cannot wait in `take`.

        Raises:
            RequestError: 429, too many wait to be read.
        """
        with self._lock:
            return None if name in self._residents else self._start(name)

    def take(self, name: str, *, adapter_id: str) -> Resolved[S]:
        """The adapter `name` for one request, called `adapter_id` there; read now where it is not loaded.

        Raises:
            RequestError: 429, too many wait to be read; and what reading it raises.
        """
        with self._lock:
            if resident := self._residents.get(name):
                self._used(name)
                return resident.lease(adapter_id)
            future = self._start(name)
        # from the future, not from the table, which may have let go of it meanwhile
        return future.result().lease(adapter_id)

    def _start(self, name: str) -> Future[_Resident[S]]:
        if name not in self._unread:
            if len(self._unread) >= _MAX_UNREAD:
                raise overloaded()
            self._unread[name] = self._readers.submit(self._load, name)
        return self._unread[name]

    def _load(self, name: str) -> _Resident[S]:
        try:
            resident: _Resident[S] = _Resident(self._read(name))
            with self._lock:
                self._residents[name] = resident
                self._used(name)
            return resident
        finally:
            with self._lock:
                del self._unread[name]

    def _used(self, name: str) -> None:
        """Make `name` the most recently used, and let go of others beyond the limit."""
        self._residents.move_to_end(name)
        excess = len(self._residents) - self._limit
        if excess > 0:
            idle = [other for other, held in self._residents.items() if not held.leases and other != name]
            for other in idle[:excess]:
                del self._residents[other]
