"""AdapterBank: the adapters loaded into one server, and the way from an adapter id to a slot.

Several versions of a bundle may be loaded at once; one is active. A request keeps the slot it was resolved
to, so the tensors of a version live until the last request on it has finished. What survives a restart is in
`soppu.serve.bank.store`; adapters that requests name by a path are read from `folders`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from torch import Tensor
from transformers import PreTrainedModel

from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair, check_shapes, validate
from soppu.base_identity import Base
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.models import linear_shapes
from soppu.serve.bank import folders, from_bundle, holdings, one_user
from soppu.serve.bank.from_bundle import Reading
from soppu.serve.bank.holdings import Answer, BundleUsers, Holder, LoadedAdapter
from soppu.serve.bank.resident import DEFAULT_RESIDENT, OVERHEAD, Figures, Residents
from soppu.serve.layers.adapted_linear import Router, install
from soppu.serve.layers.factors import BundleSlot, PairSlot, Slot
from soppu.serve.layers.frame import Frame
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)
Resolved = holdings.Resolved[Slot]
_MOST_UNREAD = 4096  # users that may wait to be read: a queue's length is the engine's affair


@dataclass(frozen=True)
class Mount:
    """A folder of immutable adapter folders, which requests name by their path below it."""

    root: Path
    max_active: int = 1024  # adapters of it in memory at once, beside those that running requests are on


@dataclass(frozen=True, eq=False)
class _Version:
    """A loaded bundle: its users where they lie, and its bases in memory."""

    shelf: Shelf
    frame: Frame


Ticket = tuple[_Version, int]  # a user of a bundle, by place: what is read when somebody asks


class AdapterBank(Holder[Slot | Ticket, LoadedAdapter]):
    """Loaded bundles and PEFT adapters of one model. Every method may be called from any thread.

    Args:
        resident: bytes of bundles' users that stay in memory, beside those that running requests are on;
            the others are read from the bundle when they ask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        base_hash: str,
        base_model: str = "",
        mount: Mount | None = None,
        resident: int = DEFAULT_RESIDENT,
    ) -> None:
        super().__init__()
        self._mount = mount
        self._folders: Residents[str, LoadedAdapter]
        self._folders = Residents(self._read, limit=mount.max_active if mount else 0)
        self._users: Residents[Ticket, BundleSlot]
        self._users = Residents(_read_user, limit=resident, weigh=_weight, most_unread=_MOST_UNREAD)
        self.base = Base(base_model, base_hash)
        self.router = Router()
        self._model = model
        self._dtype = model.dtype
        self._shapes = linear_shapes(model)
        self._versions: dict[str, _Version] = {}
        self._ahead = False

    def stage(self, bundle: Bundle | Shelf, *, bundle_id: str) -> None:
        """Load a bundle so that "user@<bundle id>" is served. Loading it again changes nothing. O(bases).

        Raises:
            BundleError: it was made for another base model, or names a module the model does not have or has
                in another shape. Nothing is loaded then.
        """
        if bundle_id in self._held.bundles:
            return
        shelf = bundle if isinstance(bundle, Shelf) else Shelf.of(bundle)
        self._check(shelf, bundle_id)
        version = _Version(shelf, from_bundle.frame(shelf, cast=self._cast))
        with self._changing:
            install(self._model, version.frame, router=self.router)
            users = BundleUsers[Slot | Ticket](shelf.users, lambda place: (version, place))
            self._become(self._held.stage(bundle_id, users))
            self._versions[bundle_id] = version
            if self._ahead:
                self._read_users(bundle_id)

    def read_ahead(self) -> None:
        """From now on, read the users of bundles before they ask, as many as may stay in memory."""
        with self._changing:
            self._ahead = True
            for bundle_id in self._versions:
                self._read_users(bundle_id)

    def _read_users(self, bundle_id: str) -> None:
        version = self._versions[bundle_id]
        tickets = ((version, place) for place in range(len(version.shelf.users)))
        self._users.read_ahead(tickets, lambda: self._versions.get(bundle_id) is version)

    def drop(self, bundle_id: str) -> None:
        """Forget a bundle. Requests under way finish on it. BundleError if it is active or not loaded."""
        with self._changing:
            self._become(self._held.drop(bundle_id))
            version = self._versions.pop(bundle_id)
        self._users.forget(lambda ticket: ticket[0] is version)

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Load a PEFT adapter under `name`, or replace it; requests under way finish on the old one.

        An adapter that states no base hash (made by another tool) is taken if the name of its base model is
        this model's and its shapes fit, and logged.

        Raises:
            AdapterError: another base model, a module or shape the model does not have, NaN, or a name that
                a user of the active bundle has.
        """
        loaded = self._load(name, adapter)
        if not loaded.verified:
            _LOG.warning("adapter %r states no base hash; its name and its shapes fit", name)
        with self._changing:
            held = self._held.add(name, loaded)
            install(self._model, adapter.pairs, router=self.router)
            self._become(held)

    def resolve(self, adapter_id: str) -> Resolved:
        """What `adapter_id` means now; see `Holdings.resolve`. "" is the base model.

        What is no such name is a path in the mount, and is read where it is not loaded: this may block.

        Raises:
            RequestError: 424 `generation`, as LoRAX answers for an adapter it cannot load; 422, a path that
                may not be named; 429, too many adapters wait to be read.
        """
        if not adapter_id:
            return Resolved()
        resolved = self._held.resolve(adapter_id)
        if isinstance(resolved, str):
            make = _lease_of_folder(adapter_id)
            return self._folders.take(self._path(adapter_id), make)
        if isinstance(resolved.where, tuple):
            version = resolved.version
            return self._users.take(resolved.where, lambda slot: Resolved(adapter_id, version, slot))
        return Resolved(adapter_id, resolved.version, resolved.where)

    def reading(self, adapter_id: str) -> Future[Any] | None:
        """What to wait for before `resolve`, so that it does not block; None for nothing. Never blocks.

        Raises:
            RequestError: as `resolve`, where no disk is needed to know it.
        """
        if not adapter_id:
            return None
        resolved = self._held.resolve(adapter_id)
        if isinstance(resolved, str):
            return self._folders.reading(self._path(adapter_id))
        return self._users.reading(resolved.where) if isinstance(resolved.where, tuple) else None

    def residents(self) -> dict[str, LoadedAdapter]:
        """Path -> adapter, of those in memory that requests named by their path."""
        return self._folders.values()

    def in_memory(self, adapter_id: str) -> bool:
        """Whether what an id means now is in memory: a user's numbers, or an adapter."""
        resolved = self._held.resolve(adapter_id)
        if isinstance(resolved, str):
            return adapter_id in self._folders
        return resolved.where in self._users if isinstance(resolved.where, tuple) else True

    def figures(self) -> Figures:
        """Of bundles' users: how many are in memory, in which bytes, and what came and went."""
        return self._users.figures()

    def answers(self, user: str) -> Answer | None:
        """As of a holder; folders in a folder of the user's name are the user's too, while loaded."""
        paths = tuple(path for path in self.residents() if unquote(PurePosixPath(path).parent.name) == user)
        answer = super().answers(user) or (Answer() if paths else None)
        return answer and replace(answer, loaded=(*answer.loaded, *paths))

    def _path(self, adapter_id: str) -> str:
        """The mounted folder's folder that an id names. RequestError where it cannot name one."""
        if self._mount is None:
            raise failed(f"adapter {adapter_id!r} is not served here; {self._held.resolve(adapter_id)}")
        try:
            return folders.plain(adapter_id)
        except RequestError as error:
            raise self._beside(error, adapter_id) from None

    def _read(self, path: str) -> LoadedAdapter:
        """Read one of the mounted folders, in a thread of `Residents`."""
        assert self._mount is not None  # else `_path` refuses
        try:
            adapter = folders.read(self._mount.root, path)
            loaded = self._load(path, adapter)
        except RequestError as error:
            raise self._beside(error, path) from None
        except (AdapterError, RuntimeError, MemoryError) as error:  # of torch: no memory on the device
            raise failed(str(error) or type(error).__name__) from None
        with self._changing:
            install(self._model, adapter.pairs, router=self.router)
        return loaded

    def _beside(self, error: RequestError, name: str) -> RequestError:
        """A folder's error, and why the id is no name either."""
        why = self._held.resolve(name)
        if error.status != 424 or not isinstance(why, str):
            return error
        return RequestError(f"{error}; nor is it a name: {why}", status=424, error_type=error.error_type)

    def _load(self, name: str, adapter: LoraAdapter) -> LoadedAdapter:
        """Bring an adapter to the model's device and type. AdapterError where it does not fit the model."""
        validate(adapter, who=name)
        base_identity.check(adapter.base, self.base, who=name, whose="this server has")
        check_shapes(adapter, self._shapes, who=name)
        pairs = {
            # B lies as its transpose, as batches of pairs do
            module: LoraPair(self._cast(module, pair.A), self._cast(module, pair.B.mT).mT)
            for module, pair in adapter.pairs.items()
        }
        return LoadedAdapter.of(adapter, self.base, where=PairSlot(pairs))

    def _check(self, bundle: Shelf, bundle_id: str) -> None:
        who = f"bundle {bundle_id[:12]}"
        base_identity.check(bundle.base, self.base, who=who, whose="this server has", error=BundleError)
        for name, shape in bundle.shapes.items():
            if name not in self._shapes:
                raise BundleError(f"{who}: {name}: the base model has no such linear layer")
            if shape != self._shapes[name]:
                raise BundleError(f"{who}: {name}: shape {shape}, the base model has {self._shapes[name]}")

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        weight = self._model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        # a quantised layer's weights are integers
        dtype = weight.dtype if weight.is_floating_point() else self._dtype
        return tensor.to(device=weight.device, dtype=dtype).contiguous()


def _read_user(ticket: Ticket) -> BundleSlot:
    """A user's slot, in a thread of `Residents`. RequestError 424 where the bundle's page is damaged."""
    (shelf, frame), place = (ticket[0].shelf, ticket[0].frame), ticket[1]
    try:
        user = one_user.read(shelf, place, Reading(thin=frame.reads_records))
    except (BundleError, RuntimeError, MemoryError) as error:  # of torch: no memory on the device
        raise failed(str(error) or type(error).__name__) from None
    return BundleSlot(frame, place, user.cluster, frame.numbers(user.cores, user.record))


def _weight(slot: BundleSlot) -> int:
    assert slot.numbers is not None  # as `_read_user` makes them
    return slot.numbers.size + OVERHEAD


def _lease_of_folder(adapter_id: str) -> Callable[[LoadedAdapter], Resolved]:
    return lambda adapter: Resolved(adapter_id, adapter.content_hash, adapter.where)
