"""AdapterBank: the adapters loaded into one server, and the way from an adapter id to a slot.

Several versions of a bundle may be loaded at once; one is active. A request keeps the slot it was resolved
to, so the tensors of a version live until the last request on it has finished. Nothing here touches a disk:
that is `soppu.serve.bank.store`.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from soppu import base_identity
from soppu.adapter import LoraAdapter, LoraPair, check_shapes, validate
from soppu.base_identity import Base
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError
from soppu.models import linear_shapes
from soppu.serve.bank import from_bundle, holdings
from soppu.serve.bank.holdings import Commit, Holder, LoadedAdapter
from soppu.serve.layers.adapted_linear import Router, install
from soppu.serve.layers.factors import BundleSlot, PairSlot, Slot
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)
Resolved = holdings.Resolved[Slot]
_Commit = Commit[Slot, LoadedAdapter]


class AdapterBank(Holder[Slot, LoadedAdapter]):
    """Loaded bundles and PEFT adapters of one model. Every method may be called from any thread."""

    def __init__(self, model: PreTrainedModel, *, base_hash: str, base_model: str = "") -> None:
        super().__init__()
        self.base = Base(base_model, base_hash)
        self.router = Router()
        self._model = model
        self._dtype = model.dtype
        self._shapes = linear_shapes(model)

    def stage(self, bundle: Bundle, *, bundle_id: str, commit: _Commit = holdings.at_once) -> None:
        """Load a bundle so that "user@<bundle id>" is served. Loading it again changes nothing.

        Raises:
            BundleError: it was made for another base model, or names a module the model does not have or has
                in another shape. Nothing is loaded then.
        """
        if bundle_id in self._held.bundles:
            return
        self._check(bundle, bundle_id)
        factors = from_bundle.read(bundle, cast=self._cast)
        members = zip(bundle.users, bundle.cluster.tolist(), strict=True)
        users = {user: BundleSlot(factors, index, cluster) for index, (user, cluster) in enumerate(members)}
        with self._changing:
            install(self._model, factors, router=self.router)
            self._become(self._held.stage(bundle_id, users), commit)

    def drop(self, bundle_id: str, *, commit: _Commit = holdings.at_once) -> None:
        """Forget a bundle. Requests under way finish on it. BundleError if it is active or not loaded."""
        with self._changing:
            self._become(self._held.drop(bundle_id), commit)

    def add(self, name: str, adapter: LoraAdapter, *, commit: _Commit = holdings.at_once) -> None:
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
        pairs = {
            module: LoraPair(self._cast(module, pair.A), self._cast(module, pair.B))
            for module, pair in adapter.pairs.items()
        }
        loaded = LoadedAdapter.of(adapter, self.base, where=PairSlot(pairs))
        if not loaded.verified:
            _LOG.warning("adapter %r states no base hash; its name and its shapes fit", name)
        with self._changing:
            held = self._held.add(name, loaded)
            install(self._model, pairs, router=self.router)
            self._become(held, commit)

    def resolve(self, adapter_id: str) -> Resolved:
        """What `adapter_id` means now; see `Holdings.resolve`. "" is the base model.

        Raises:
            RequestError: 424 `generation`, as LoRAX answers for an adapter it cannot load.
        """
        if not adapter_id:
            return Resolved()
        resolved = self._held.resolve(adapter_id)
        if isinstance(resolved, str):
            raise failed(f"adapter {adapter_id!r} is not served here; {resolved}")
        return replace(resolved, adapter_id=adapter_id)

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
        # a quantised layer's weights are integers
        dtype = weight.dtype if weight.is_floating_point() else self._dtype
        return tensor.to(device=weight.device, dtype=dtype).contiguous()
