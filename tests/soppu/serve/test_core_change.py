"""Cores of a batch by the compiled kernel, beside torch's own products of the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soppu.serve.layers import kernels, native
from soppu.serve.layers.deltas import CoreChange, Layers, SharedChange
from soppu.serve.layers.factors import BundleSlot, ModuleFactors, SharedFactors, Stack
from soppu.serve.layers.routing import Routing

WIDTHS, SIZE, RANKS, USERS = {"q": 36, "v": 20}, 24, (7, 5), 6
LAYERS = Layers(("q", "k", "v"), (36, 8, 20))  # nobody changes k


def _modules(kernel: kernels.Kernel | None) -> dict[str, ModuleFactors]:
    """Users 0 to 3 in cluster 0, 4 and 5 in cluster 1; the last of each has no core. Always the same."""
    g = torch.Generator().manual_seed(0)
    place, stacks = torch.tensor([0, 1, 2, -1, 0, -1]), {}
    for cluster, members in enumerate((3, 1)):
        P = torch.randn(len(WIDTHS), members, *RANKS, generator=g)
        stacks[cluster] = Stack(P, None, kernel=kernel)
    modules = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        shared = {
            cluster: SharedFactors(
                torch.randn(width, RANKS[0], generator=g),
                torch.randn(SIZE, RANKS[1], generator=g),
                stack.P[number],
                None,
                stack,
                number,
            )
            for cluster, stack in stacks.items()
        }
        modules[name] = ModuleFactors(shared, place, None)
    return modules


@pytest.mark.parametrize("users", [[0, 1, 2], [2, None, 4, 2, 3, 0], [4], [5, 3, None]])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_adds_what_torch_adds(users: list[int | None], tokens: int) -> None:
    if why := native.load():
        pytest.skip(f"no compiled kernel: {why}")
    x, made = torch.randn(len(users) * tokens, SIZE), []
    kinds = set()
    for kernel in (None, kernels.native, kernels.plain):
        modules = _modules(kernel)
        slots = [None if user is None else BundleSlot(modules, user, int(user > 3)) for user in users]
        routing = Routing(slots)
        y = torch.zeros(len(x), sum(LAYERS.widths))
        for _ in range(2):  # what the first step gathered serves the second
            routing.apply(LAYERS, x, y)
        kinds |= {(kernel is None, type(change)) for change in routing.changes(LAYERS)}
        made.append(y)
    assert kinds <= {(True, SharedChange), (False, CoreChange)}
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[2], made[0], rtol=1e-4, atol=1e-4)
    assert not made[1][:, LAYERS.columns(1)].any()


def test_a_stack_of_factored_cores_is_left_to_torch() -> None:
    modules = _modules(kernels.plain)
    for name, module in modules.items():
        shared = module.shared[0]
        assert shared.stack is not None
        Q = torch.eye(RANKS[1]).expand(len(WIDTHS), 3, -1, -1)
        stack = replace(shared.stack, Q=Q)
        modules[name] = replace(module, shared={0: replace(shared, Q=Q[0], stack=stack)})
    changes = Routing([BundleSlot(modules, 0)]).changes(LAYERS)
    assert changes and all(isinstance(change, SharedChange) for change in changes)
