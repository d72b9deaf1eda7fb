"""The bases that users of a registry are told in: which one a set's bundle has, and who puts one there."""

from __future__ import annotations

from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.compress import Bundle, joining
from soppu.cores.core import CoreAdapter, is_core
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


def publish(registry: Registry, bundle: Bundle, *, cluster: int = 0) -> str:
    """Store the bases of a bundle and put them in force: who is trained from then on is told in them.

    Returns the basis' id.

    Raises:
        BundleError: the bundle has no module with a basis on both sides.
    """
    basis_id = registry.put_basis(joining.basis_of(bundle, cluster))
    registry.use_basis(basis_id)
    return basis_id
