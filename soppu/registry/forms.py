"""The forms in which an adapter is stored: pairs (A, B), or a core in a basis that is stored too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from soppu import adapter as peft_folder
from soppu.adapter import LoraAdapter
from soppu.base_identity import Base
from soppu.cores import folder as core_folder
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import AdapterError, RegistryError

Stored = LoraAdapter | CoreAdapter
T = TypeVar("T", LoraAdapter, CoreAdapter)
LORA, CORE = "lora", "core"
WEIGHTS = {LORA: peft_folder.WEIGHTS_FILE, CORE: core_folder.WEIGHTS_FILE}


@dataclass(frozen=True)
class Form:
    """An adapter that may be stored: checked, with the names it goes by."""

    adapter: Stored
    kind: str
    id: str
    base: Base  # as far as adapter and basis know it
    write: Callable[[Path], None]  # into the folder given
    check: Callable[[Path], Stored]  # reads the folder; RegistryError if it holds something else


def form_of(adapter: Stored, *, who: str, basis_of: Callable[[str], CoreBasis]) -> Form:
    """An adapter as it is to be stored. AdapterError: malformed, not finite, or it does not fit its basis.

    Args:
        who: named in messages.
        basis_of: reads the basis of an id; what it raises is passed on, with the core's name.
    """
    if isinstance(adapter, CoreAdapter):
        core = replace(adapter)  # a hash kept from before would miss a change made to the tensors since
        placed = CoreInBasis(core, _basis(core, who, basis_of), who=who)
        check = partial(read_core, core.id, core.content_hash())
        known = core.base.joined(placed.basis.base)
        return Form(core, CORE, core.id, known, partial(core_folder.write, core), check)
    pairs = replace(adapter)
    peft_folder.validate(pairs, who=who)
    adapter_id = f"a-{pairs.content_hash()[:16]}"
    check_pairs = partial(read_pairs, adapter_id, pairs.content_hash())
    return Form(pairs, LORA, adapter_id, pairs.base, partial(peft_folder.write, pairs), check_pairs)


def read_pairs(adapter_id: str, content: str, folder: Path) -> LoraAdapter:
    """The pairs in a folder. RegistryError if it is damaged or holds others."""
    return _read(peft_folder.read, adapter_id, content, folder)


def read_core(core_id: str, content: str, folder: Path) -> CoreAdapter:
    """The core in a folder. RegistryError if it is damaged or holds another."""
    return _read(core_folder.read, core_id, content, folder)


def _read(read: Callable[[Path], T], adapter_id: str, content: str, folder: Path) -> T:
    try:
        adapter = read(folder)
    except AdapterError as error:
        raise RegistryError(f"adapter {adapter_id}: its stored copy is damaged: {error}") from error
    if adapter.content_hash() != content:
        raise RegistryError(
            f"adapter {adapter_id}: its stored copy is damaged: content {adapter.content_hash()[:16]}"
        )
    return adapter


def _basis(core: CoreAdapter, who: str, basis_of: Callable[[str], CoreBasis]) -> CoreBasis:
    try:
        return basis_of(core.basis_id)
    except RegistryError as error:
        raise RegistryError(f"{who}: core {core.id} cannot be stored without its basis: {error}") from error
