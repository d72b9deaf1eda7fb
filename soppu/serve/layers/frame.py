"""Frame: a bundle's modules without its users, whose numbers are put in for the rows of one batch at a time.

So nothing is kept for a user who asks for nothing, whoever is in the batch shares every product, and the
layers see what they see of a bundle that is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from soppu.serve.layers.factors import (
    BundleSlot,
    ModuleFactors,
    Numbers,
    OwnNumbers,
    SharedFactors,
    Stack,
)
from soppu.serve.layers.joined import Joined
from soppu.serve.layers.kernels import Kernel
from soppu.serve.layers.records import Records

Members = list[tuple[int, BundleSlot]]  # (row of the batch, its slot)


@dataclass(frozen=True, eq=False)
class Kind:
    """Modules whose cores are alike, so that a user's lie in one tensor (M, k_out, k_in)."""

    modules: tuple[str, ...]
    like: Tensor  # (k_out, k_in, 0) of their type, on their device
    kernel: Kernel | None  # `Stack.kernel`
    # cluster -> `Stack.bases` and `Stack.together`, which outlive the batch
    bases: dict[int, tuple[dict[Any, Any], dict[Any, Any]]] = field(default_factory=dict)


class Frame(Mapping[str, ModuleFactors]):
    """Module -> its bases. For any thread, but `beside`, which is for one."""

    def __init__(self, modules: Mapping[str, ModuleFactors]) -> None:
        """From modules with the bases of every cluster in `bases`, and `own` of a table of nobody."""
        self._modules = modules
        self._joined = Joined()
        kinds: dict[tuple[object, ...], list[str]] = {}
        for name, module in modules.items():
            U, V = next(iter(module.bases.values()))
            if U is not None and V is not None:
                kinds.setdefault((U.shape[1], V.shape[1], U.dtype, U.device), []).append(name)
        self.kinds = tuple(_kind(key, names, modules) for key, names in kinds.items())

    def __getitem__(self, name: str) -> ModuleFactors:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def reads_records(self) -> bool:
        """Whether there is a kernel for records, so that they need not be widened."""
        return all(module.own is not None and module.own.kernel for module in self._modules.values())

    def numbers(self, cores: Mapping[str, Tensor], record: Records) -> Numbers:
        """A user's numbers, from the cores of some modules, (k_out, k_in) float32, and a record."""
        made: list[Tensor | None] = []
        for kind in self.kinds:
            k_out, k_in, _ = kind.like.shape
            whole = torch.zeros(len(kind.modules), k_out, k_in)
            for number, name in enumerate(kind.modules):
                if name in cores:
                    whole[number] = cores[name]
            made.append(whole.to(kind.like) if any(name in cores for name in kind.modules) else None)
        return Numbers(tuple(made), record)

    def beside(self, members: Members) -> Members:
        """The same rows in tables of their users alone. O(numbers in the users' cores, and new records)."""
        people = list({id(slot): slot for _, slot in members}.values())
        numbers = [_numbers(slot) for slot in people]
        table, places = self._joined.of([one.record for one in numbers])
        modules = {name: self._recorded(module, table) for name, module in self._modules.items()}
        for number, kind in enumerate(self.kinds):
            cores = [one.cores[number] for one in numbers]
            for name, factors in _stacked(kind, cores, people, places, self._modules).items():
                modules[name] = replace(modules[name], shared=factors.shared, place=factors.place)
        slots = {
            id(slot): BundleSlot(modules, place, slot.cluster)
            for slot, place in zip(people, places, strict=True)
        }
        return [(row, slots[id(slot)]) for row, slot in members]

    def _recorded(self, module: ModuleFactors, table: Records) -> ModuleFactors:
        assert module.own is not None  # of nobody, but there
        nobody = torch.full((len(table.starts) - 1,), -1)
        own: OwnNumbers | None = replace(module.own, records=table) if len(table.data) else None
        return replace(module, shared={}, place=nobody, own=own)


def _kind(key: tuple[Any, ...], names: Sequence[str], modules: Mapping[str, ModuleFactors]) -> Kind:
    k_out, k_in, dtype, device = key
    own = modules[names[0]].own
    like = torch.zeros(k_out, k_in, 0, dtype=dtype, device=device)
    return Kind(tuple(names), like, own.kernel if own else None)


def _numbers(slot: BundleSlot) -> Numbers:
    assert slot.numbers is not None  # slots of a frame have them
    return slot.numbers


def _stacked(
    kind: Kind,
    cores: Sequence[Tensor | None],
    people: Sequence[BundleSlot],
    places: Sequence[int],
    modules: Mapping[str, ModuleFactors],
) -> dict[str, ModuleFactors]:
    """The modules of one kind with the cores of those who have some."""
    place, members = torch.full((len(people),), -1), dict[int, list[Tensor]]()
    for core, slot, at in zip(cores, people, places, strict=True):
        if core is not None:
            here = members.setdefault(slot.cluster, [])
            place[at] = len(here)
            here.append(core)
    stacks = {
        cluster: Stack(
            torch.stack(held, dim=1), None, *kind.bases.setdefault(cluster, ({}, {})), kernel=kind.kernel
        )
        for cluster, held in members.items()
    }
    made = {}
    for number, name in enumerate(kind.modules):
        shared = {}
        for cluster, stack in stacks.items():
            U, V = modules[name].bases[cluster]
            assert U is not None and V is not None  # as a kind has both
            shared[cluster] = SharedFactors(U, V, stack.P[number], None, stack, number)
        made[name] = replace(modules[name], shared=shared, place=place)
    return made
