"""AdapterBank: the adapters loaded into one server, and the way from an adapter id to a slot.

Several versions of a bundle may be loaded at once; one is active. A request keeps the slot it was resolved
to, so the tensors of a version live until the last request on it has finished. Nothing here touches a disk:
that is `soppu.serve.bank.store`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair, check_shapes, validate
from soppu.base_identity import Base
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.serve.bank import from_bundle
from soppu.serve.layers.adapted_linear import Router, install, linear_shapes
from soppu.serve.layers.factors import BundleSlot, PairSlot, Slot
from soppu.serve.names import find_version
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Resolved:
    """What an adapter id meant when its request arrived.

    Attributes:
        adapter_id: as asked for; "" is the base model.
        version: the bundle id, or the adapter's content hash; "" for the base model.
        slot: where the layers find it; None is the base model.
    """

    adapter_id: str = ""
    version: str = ""
    slot: Slot | None = None


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A PEFT adapter in memory, with what a listing says about it."""

    slot: PairSlot
    content_hash: str
    verified: bool
    rank: int


class AdapterBank:
    """Loaded bundles and PEFT adapters of one model. Every method may be called from any thread."""

    def __init__(self, model: PreTrainedModel, *, base_hash: str, base_model: str = "") -> None:
        self.base = Base(base_model, base_hash)
        self.router = Router()
        self._model = model
        self._dtype = model.dtype
        self._shapes = linear_shapes(model)
        self._lock = threading.RLock()
        self._bundles: dict[str, Mapping[str, BundleSlot]] = {}
        self._adapters: dict[str, LoadedAdapter] = {}
        self._active = ""

    @property
    def active(self) -> str:
        """Id of the active bundle, "" if there is none."""
        return self._active

    def bundles(self) -> dict[str, tuple[str, ...]]:
        """Bundle id -> its users, in the order they were loaded."""
        with self._lock:
            return {bundle_id: tuple(users) for bundle_id, users in self._bundles.items()}

    def adapters(self) -> dict[str, LoadedAdapter]:
        """Name -> loaded PEFT adapter."""
        with self._lock:
            return dict(self._adapters)

    def stage(self, bundle: Bundle, *, bundle_id: str) -> None:
        """Load a bundle so that "user@<bundle id>" is served. Loading it again changes nothing.

        Raises:
            BundleError: it was made for another base model, or names a module the model does not have or has
                in another shape. Nothing is loaded then.
        """
        if bundle_id in self.bundles():
            return
        self._check(bundle, bundle_id)
        factors = from_bundle.read(bundle, cast=self._cast)
        members = zip(bundle.users, bundle.cluster.tolist(), strict=True)
        users = {user: BundleSlot(factors, index, cluster) for index, (user, cluster) in enumerate(members)}
        with self._lock:  # only now: requests must not wait for the copying
            install(self._model, factors, router=self.router)
            self._bundles.setdefault(bundle_id, users)

    def activate(self, bundle_id: str) -> None:
        """Serve plain user names from this bundle from now on; "" serves none.

        Raises:
            BundleError: it is not loaded, or one of its users has the name of a loaded PEFT adapter.
        """
        with self._lock:
            if bundle_id:
                users = self._bundle(bundle_id)
                if clash := sorted(users.keys() & self._adapters.keys()):
                    raise BundleError(
                        f"bundle {bundle_id[:12]}: user {clash[0]!r} has the name of a loaded adapter;"
                        " delete that adapter first"
                    )
            self._active = bundle_id

    def drop(self, bundle_id: str) -> None:
        """Forget a bundle. Requests under way finish on it. BundleError if it is active or not loaded."""
        with self._lock:
            self.check_drop(bundle_id)
            del self._bundles[bundle_id]

    def check_drop(self, bundle_id: str) -> None:
        """Raise what `drop` would: BundleError if the bundle is active or not loaded."""
        with self._lock:
            self._bundle(bundle_id)
            if bundle_id == self._active:
                raise BundleError(f"bundle {bundle_id[:12]} is active; activate another one first")

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Load a PEFT adapter under `name`, or replace it; requests under way finish on the old one.

        An adapter that states no base hash (made by another tool) is taken if the name of its base model is
        this model's and its shapes fit, and logged.

        Raises:
            AdapterError: another base model, a module or shape the model does not have, NaN, or a name that
                a user of the active bundle has.
        """
        validate(adapter, who=name)
        base_identity.check(adapter.base, self.base, who=name, whose="this server has")
        check_shapes(adapter, self._shapes, who=name)
        verified = bool(self.base.hash) and adapter.base_hash == self.base.hash
        if not verified:
            _LOG.warning("adapter %r states no base hash; its name and its shapes fit", name)
        pairs = {
            module: LoraPair(self._cast(module, pair.A), self._cast(module, pair.B))
            for module, pair in adapter.pairs.items()
        }
        rank = max(pair.rank for pair in pairs.values())
        with self._lock:
            if self._active and name in self._bundles[self._active]:
                raise AdapterError(f"{name}: the active bundle {self._active[:12]} has a user of that name")
            install(self._model, pairs, router=self.router)
            self._adapters[name] = LoadedAdapter(PairSlot(pairs), adapter.content_hash(), verified, rank)

    def remove(self, name: str) -> None:
        """Forget a PEFT adapter. Requests under way finish on it. AdapterError if it is not there."""
        with self._lock:
            self.check_remove(name)
            del self._adapters[name]

    def check_remove(self, name: str) -> None:
        """Raise what `remove` would: AdapterError if no adapter has that name."""
        with self._lock:
            if name not in self._adapters:
                raise AdapterError(f"no adapter {name!r} is loaded; there are {len(self._adapters)}")

    def resolve(self, adapter_id: str) -> Resolved:
        """Find what `adapter_id` means now.

        "alice" is alice in the active bundle, or the PEFT adapter of that name; "alice@<bundle id>" (or a
        prefix that only one loaded bundle has) is alice in that bundle, active or not; "" is the base model.

        Raises:
            RequestError: 424 `generation`, as LoRAX answers for an adapter it cannot load.
        """
        if not adapter_id:
            return Resolved()
        with self._lock:
            if adapter_id in self._adapters:
                loaded = self._adapters[adapter_id]
                return Resolved(adapter_id, loaded.content_hash, loaded.slot)
            if self._active and adapter_id in (users := self._bundles[self._active]):
                return Resolved(adapter_id, self._active, users[adapter_id])
            return self._resolve_version(adapter_id)

    def _resolve_version(self, adapter_id: str) -> Resolved:
        user, prefix, found = find_version(adapter_id, self._bundles)
        if not prefix:
            where = f"the active bundle is {self._active[:12]}" if self._active else "no bundle is active"
            raise _not_served(adapter_id, f"{where}, {len(self._adapters)} single adapters are loaded")
        if len(found) != 1:
            raise _not_served(
                adapter_id, f"{len(found)} of {len(self._bundles)} loaded bundles begin with {prefix!r}"
            )
        users = self._bundles[found[0]]
        if user not in users:
            raise _not_served(adapter_id, f"bundle {found[0][:12]} holds {len(users)} users, not {user!r}")
        return Resolved(adapter_id, found[0], users[user])

    def _bundle(self, bundle_id: str) -> Mapping[str, BundleSlot]:
        if bundle_id not in self._bundles:
            raise BundleError(f"bundle {bundle_id[:12]!r} is not loaded; there are {len(self._bundles)}")
        return self._bundles[bundle_id]

    def _check(self, bundle: Bundle, bundle_id: str) -> None:
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
        dtype = (
            weight.dtype if weight.is_floating_point() else self._dtype
        )  # a quantised layer's are integers
        return tensor.to(device=weight.device, dtype=dtype).contiguous()


def _not_served(adapter_id: str, why: str) -> RequestError:
    return failed(f"adapter {adapter_id!r} is not served here; {why}")
