"""In which basis users are told: the one that a set's bundle has, and another they are carried over to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis, is_core
from soppu.cores.projecting import Carrier, Projected, from_lora
from soppu.errors import RegistryError
from soppu.registry import Registry


def of_set(registry: Registry, set_id: str, base: Base) -> str:
    """The basis that a set is told in, "" where its adapters are to be fitted.

    That is the basis in force for the base model, where any of them is a core. Where none is in force it is
    the one that all are cores of; with adapters among them, as after a join, everybody is fitted anew.

    Raises:
        RegistryError: cores of several bases, and none is in force.
    """
    told = registry.bases_of_set(set_id)
    if not told.keys() - {""}:
        return ""
    if in_force := registry.current_basis(base):
        return in_force
    if "" in told:
        return ""
    if len(told) > 1:
        found = ", ".join(f"{basis_id} ({count} users)" for basis_id, count in sorted(told.items()))
        raise RegistryError(
            f"the set's cores are told in several bases: {found}; put one of them in force, by `soppu bases"
            " --use ID`, and the others are carried over to it"
        )
    return next(iter(told))


def read(registry: Registry, adapter_id: str) -> LoraAdapter | CoreAdapter:
    """An adapter in the form in which it is stored."""
    return registry.get_core(adapter_id) if is_core(adapter_id) else registry.get_adapter(adapter_id)


@dataclass(frozen=True)
class CarriedOver:
    """Users as they are told in another basis: the ids of their cores, and what each has lost."""

    basis_id: str
    cores: Mapping[str, str]  # user -> core id
    errors: Mapping[str, float]  # user -> relative error of the whole change; 0 where nothing was carried


def carry_over(
    registry: Registry, basis_id: str, members: Mapping[str, str], *, run: str = ""
) -> CarriedOver:
    """Tell users (user -> adapter id) in a basis of the registry, and make that current; nobody is trained.

    Cores of another basis are carried over: exact where the new one spans them. Adapters are projected. Who
    is told in it already stays as they are. What was current before stays in the history. One user is in
    memory at a time; a user's error is kept as the metric `carried_error`. O(k^3) a user and module.

    Raises:
        RegistryError: an unknown basis, or an adapter that is gone or damaged.
        AdapterError: one that the basis is not for: another base model, other modules.
    """
    moving = _Moving(registry, registry.get_basis(basis_id))
    cores, errors = {}, {}
    for user, held in members.items():
        found = moving.told(user, held)
        cores[user], errors[user] = held, 0.0
        if found is not None:
            metrics = {"carried_error": found.error}
            cores[user] = registry.put_adapter(found.core, user=user, run=run, metrics=metrics)
            errors[user] = found.error
    return CarriedOver(basis_id, cores, errors)


class _Moving:
    """What takes users to one basis; of every other basis it is found once."""

    def __init__(self, registry: Registry, basis: CoreBasis) -> None:
        self._registry, self._basis = registry, basis
        self._carriers: dict[str, tuple[CoreBasis, Carrier]] = {}

    def told(self, user: str, adapter_id: str) -> Projected | None:
        """The user in the basis; None for one who is told in it already."""
        adapter = read(self._registry, adapter_id)
        if isinstance(adapter, LoraAdapter):
            return from_lora(adapter, self._basis, who=user)
        if adapter.basis_id == self._basis.id:
            return None
        if adapter.basis_id not in self._carriers:
            old = self._registry.get_basis(adapter.basis_id)
            self._carriers[old.id] = old, Carrier(old, self._basis)
        old, carrier = self._carriers[adapter.basis_id]
        return carrier.carry(CoreInBasis(adapter, old, who=user))
