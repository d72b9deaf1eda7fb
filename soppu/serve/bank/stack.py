"""Lays cores of like modules into one tensor each. What a batch makes of that: `layers.routing`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from soppu.serve.layers.factors import ModuleFactors, SharedFactors, Stack


def stacked(factors: Mapping[str, ModuleFactors]) -> dict[str, ModuleFactors]:
    """The same factors, cores of one shape and one set of users in one `Stack`, their parts views of it.

    Equal `place` tensors become one. O(numbers in the cores); at the most one stack is in memory twice.
    """
    made, places = dict(factors), dict[bytes, Tensor]()
    for name, one in made.items():
        place = places.setdefault(one.place.numpy().tobytes(), one.place)
        made[name] = replace(one, place=place, shared=dict(one.shared))
    alike: dict[Hashable, list[tuple[str, int]]] = {}
    for name, one in made.items():
        for cluster, shared in one.shared.items():
            alike.setdefault(_kind(cluster, one, shared), []).append((name, cluster))
    for members in alike.values():
        _stack(made, members)
    return made


def _kind(cluster: int, factors: ModuleFactors, shared: SharedFactors) -> Hashable:
    Q = None if shared.Q is None else shared.Q.shape
    return cluster, id(factors.place), shared.P.shape, Q, shared.P.dtype, shared.P.device


def _stack(factors: Mapping[str, ModuleFactors], members: list[tuple[str, int]]) -> None:
    found = [factors[name].shared[cluster] for name, cluster in members]
    Q = [one.Q for one in found if one.Q is not None]
    stack = Stack(torch.stack([one.P for one in found]), torch.stack(Q) if Q else None)
    for number, ((name, cluster), one) in enumerate(zip(members, found, strict=True)):
        view = None if stack.Q is None else stack.Q[number]
        shared = factors[name].shared
        assert isinstance(shared, dict)  # made so above
        shared[cluster] = replace(one, P=stack.P[number], Q=view, stack=stack, number=number)
