"""Puts the cores of modules of one kind into one tensor. How a batch uses it: `layers.routing`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from soppu.serve.layers.factors import ModuleFactors, SharedFactors, Stack


def stacked(factors: Mapping[str, ModuleFactors]) -> dict[str, ModuleFactors]:
    """The same factors, cores of one shape and one set of users in one `Stack`, their parts views of it.

    Equal `place` tensors become one. O(numbers in the cores); at most one stack is in memory twice.
    """
    copies, places = dict[str, ModuleFactors](), dict[bytes, Tensor]()
    alike: dict[Hashable, list[tuple[str, int]]] = {}
    for name, module in factors.items():
        place = places.setdefault(module.place.numpy().tobytes(), module.place)
        copies[name] = replace(module, place=place, shared=dict(module.shared))
        for cluster, shared in module.shared.items():
            alike.setdefault(_kind(cluster, copies[name], shared), []).append((name, cluster))
    for members in alike.values():
        _stack(copies, members)
    return copies


def _kind(cluster: int, factors: ModuleFactors, shared: SharedFactors) -> Hashable:
    Q = None if shared.Q is None else shared.Q.shape
    return cluster, id(factors.place), shared.P.shape, Q, shared.P.dtype, shared.P.device


def _stack(factors: Mapping[str, ModuleFactors], members: list[tuple[str, int]]) -> None:
    parts = [factors[name].shared[cluster] for name, cluster in members]
    Q = [part.Q for part in parts if part.Q is not None]
    stack = Stack(torch.stack([part.P for part in parts]), torch.stack(Q) if Q else None)
    for number, ((name, cluster), part) in enumerate(zip(members, parts, strict=True)):
        view = None if stack.Q is None else stack.Q[number]
        shared = factors[name].shared
        assert isinstance(shared, dict)  # copied so above
        shared[cluster] = replace(part, P=stack.P[number], Q=view, stack=stack, number=number)
