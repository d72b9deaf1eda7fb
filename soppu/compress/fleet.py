"""The adapters of many users as one input: do they belong together. Not for compressing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, validate
from soppu.errors import AdapterError


def check(adapters: Mapping[str, LoraAdapter]) -> None:
    """Refuse adapters that cannot share a basis.

    Raises:
        AdapterError: none at all, a malformed one, or two that differ in base model or in a module's shape.
    """
    if not adapters:
        raise AdapterError("no adapters to compress; at least one is needed")
    first_user, first = next(iter(adapters.items()))
    shapes: dict[str, tuple[str, int, int]] = {}
    for user, adapter in adapters.items():
        validate(adapter, who=user)
        _check_base(user, adapter, first_user, first)
        for name, (o, r, i) in adapter.shapes().items():
            if r == 0:
                raise AdapterError(f"{user}: {name}: rank 0, expected 1 or more")
            other, *expected = shapes.setdefault(name, (user, o, i))
            if [o, i] != expected:
                raise AdapterError(f"{name}: {user} changes {(o, i)}, {other} changes {tuple(expected)}")


def _check_base(user: str, adapter: LoraAdapter, first_user: str, first: LoraAdapter) -> None:
    if adapter.base_hash != first.base_hash:
        found, expected = (base.base_hash[:12] or "an unknown hash" for base in (adapter, first))
        raise AdapterError(f"base model: {user} was made for {found}, {first_user} for {expected}")
    if not adapter.base_hash and adapter.base_model != first.base_model:
        # Without a hash the name is all there is to tell base models apart.
        raise AdapterError(
            f"base model: {user} was made for {adapter.base_model!r}, {first_user} for {first.base_model!r}"
        )
    if adapter.fan_in_fan_out != first.fan_in_fan_out:
        raise AdapterError(
            f"fan_in_fan_out: {user} has {adapter.fan_in_fan_out}, {first_user} has {first.fan_in_fan_out}"
        )


def factors(
    adapters: Mapping[str, LoraAdapter], name: str, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """B (o, r_n) and A (r_n, i) of every user at one module; r_n = 0 for a user without it."""
    pairs = [adapter.pairs.get(name) for adapter in adapters.values()]
    some = next(pair for pair in pairs if pair is not None)
    outs = [some.B[:, :0] if pair is None else pair.B for pair in pairs]
    ins = [some.A[:0] if pair is None else pair.A for pair in pairs]
    return [b.to(device) for b in outs], [a.to(device) for a in ins]


def ids(adapters: Mapping[str, LoraAdapter], given: Mapping[str, str] | None) -> tuple[str, ...]:
    """An id for every user: the one given, or else the registry's id of the adapter's content.

    Raises:
        AdapterError: ids are given, but not for this user.
    """
    if given is None:
        return tuple(f"a-{adapter.content_hash()[:16]}" for adapter in adapters.values())
    if missing := sorted(adapters.keys() - given.keys()):
        raise AdapterError(f"{missing[0]}: adapter_ids holds no id for this user")
    return tuple(given[user] for user in adapters)
