"""What is trained, as a value: the LoRA pairs of users, or their cores in a basis, which may be learnt too.

Users who are trained together are rows of one stack: a layer multiplies all their tokens with the basis at
once, and only what is a user's own row by row. One user is a stack of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.errors import AdapterError
from soppu.federation import emulator
from soppu.federation.attach import attached

Kind = TypeVar("Kind", LoraAdapter, CoreInBasis)
Sides = dict[str, tuple[Tensor, Tensor]]  # full-model name -> of U (o, k_out) and of V (i, k_in)


@dataclass(frozen=True, eq=False)
class Stack:
    """What n users add to one module: row n is U S_n V^T + B_n A_n, either of the two terms or both."""

    basis: tuple[Tensor, Tensor] | None = None  # U (o, k_out), V (i, k_in), which all users share
    core: Tensor | None = None  # S (n, k_out, k_in)
    A: Tensor | None = None  # (n, r, i)
    B: Tensor | None = None  # (n, o, r)

    def pair(self, row: int) -> LoraPair:
        """The factors of one user's change, with gradients to what is trained."""
        A, B = [], []
        if self.basis is not None and self.core is not None:
            A.append(self.basis[1].mT)
            B.append(self.basis[0] @ self.core[row])
        if self.A is not None and self.B is not None:
            A.append(self.A[row])
            B.append(self.B[row])
        return LoraPair(torch.cat(A), torch.cat(B, 1))


@dataclass(frozen=True, eq=False)
class Rows:
    """The change of a module where example b is of the user `row[b]`."""

    stack: Stack
    row: Tensor  # (b,) int64

    def to(self, device: torch.device, /) -> Rows:
        """Itself: a stack is made where the model is."""
        return self

    def change(self, x: Tensor, /) -> Tensor:
        """What inputs (b, t, i) or (b t, i) add. O(i k_in + k_in k_out + k_out o) a token and module."""
        stack, parts = self.stack, []
        if stack.basis is not None and stack.core is not None:
            u, v = (side.to(x.dtype) for side in stack.basis)
            parts.append(linear(self._each(linear(x, v.mT), stack.core), u))
        if stack.A is not None and stack.B is not None:
            parts.append(self._each(self._each(x, stack.A), stack.B))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _each(self, x: Tensor, stacked: Tensor) -> Tensor:
        """Every example times its user's matrix (n, out, in)."""
        weights = stacked.to(x.dtype)
        if len(weights) == 1:
            return linear(x, weights[0])
        made = x.reshape(len(self.row), -1, x.shape[-1]) @ weights[self.row].mT
        return made.reshape(*x.shape[:-1], made.shape[-1])


@dataclass(frozen=True, eq=False)
class _Attached:
    pairs: Mapping[str, Rows]


class Trained(Generic[Kind]):
    """What n users train, on one device.

    Args:
        starts: where each of them begins, copied; all of one kind and of the same shapes, cores in one basis.

    Raises:
        AdapterError: they cannot be trained together, or are of other layers than the plan's.
    """

    def __init__(self, starts: Sequence[Kind], plan: emulator.LayerPlan, device: torch.device) -> None:
        self._starts: Sequence[Kind] = starts
        stacks = _stacks(starts, device)
        own = emulator.renumbered(stacks, plan.path, {n: at for at, n in enumerate(plan.adapter)})
        self._stacks, self._own_names, self._learns = stacks, own, False
        with torch.no_grad():
            bases = {name: stack.basis for name, stack in stacks.items() if stack.basis is not None}
            self._grams = {name: (u.mT @ u, v.mT @ v) for name, (u, v) in bases.items()}
            self._origins = {name: _copy(stacks[name].core) for name in bases}
        placed: Sequence[object] = starts
        self._common: int = max(
            (one.basis.common for one in placed if isinstance(one, CoreInBasis)), default=0
        )

    def parameters(self, *sides: str) -> list[Tensor]:
        """What is trained of these: "core", "A", "B"."""
        found = [getattr(stack, side) for side in sides for stack in self._stacks.values()]
        return [tensor for tensor in found if tensor is not None]

    def learn_basis(self) -> list[Tensor]:
        """U and V of every module, as copies that gradients reach from now on: sums over all users."""
        learnt, self._learns = [], True
        for name, stack in self._stacks.items():
            if stack.basis is None:
                raise AdapterError(f"{name}: a LoRA has no basis that could be learnt; begin with a core")
            u, v = (side.clone().requires_grad_() for side in stack.basis)
            self._stacks[name] = replace(stack, basis=(u, v))
            learnt += [u, v]
        return learnt

    def basis(self) -> CoreBasis:
        """A copy of the basis as it is now, on the CPU."""
        start = self._starts[0]
        assert isinstance(start, CoreInBasis)
        held = {name: stack.basis for name, stack in self._stacks.items() if stack.basis is not None}
        sides = {name: (_copy(u).cpu(), _copy(v).cpu()) for name, (u, v) in held.items()}
        return replace(start.basis, sides=sides)

    def basis_gradient(self) -> Sides:
        """Of U and V as it has added up since `learn_basis`, on the CPU; zeros where there is none."""
        held = {name: stack.basis for name, stack in self._stacks.items() if stack.basis is not None}
        return {name: (_gradient(u), _gradient(v)) for name, (u, v) in held.items()}

    def attached(self, model: nn.Module, row: Tensor) -> AbstractContextManager[None]:
        """Have `model` (of the adapter layers) answer example b of a batch as user `row[b]`'s."""
        rows = {self._own_names[name]: Rows(stack, row) for name, stack in self._stacks.items()}
        return attached(model, _Attached(rows))

    def pairs(self, user: int) -> dict[str, LoraPair]:
        """Full-model name -> the factors of a user's change, with gradients to what is trained."""
        return {name: stack.pair(user) for name, stack in self._stacks.items()}

    def drift(self) -> Tensor | None:
        """Sum over modules and users of ||U (S - S_start) V^T||_F^2, with gradients; None where users have
        factors of their own. O(n k^3) a module: no factor of a layer's size is formed.
        """
        if self.parameters("A"):
            return None
        terms = []
        for name, stack in self._stacks.items():
            assert stack.basis is not None and stack.core is not None
            out, inn = self._grams[name]
            away = stack.core - self._origins[name]
            terms.append(((out @ away @ inn) * away).sum())
        return torch.stack(terms).sum()

    def hold(self, rows: int, columns: int) -> None:
        """No gradient for the first rows of A and columns of B, nor for what a basis has in common.

        Adam without decay then leaves them alone.
        """
        for A in self.parameters("A") if rows else ():
            assert A.grad is not None
            A.grad[:, :rows] = 0
        for B in self.parameters("B") if columns else ():
            assert B.grad is not None
            B.grad[:, :, :columns] = 0
        for stack in self._stacks.values() if self._common else ():
            assert stack.core is not None and stack.core.grad is not None
            stack.core.grad[:, : self._common] = 0
            stack.core.grad[:, :, : self._common] = 0
            for side in stack.basis or ():
                if side.grad is not None:
                    side.grad[:, : self._common] = 0

    def adapter(self, user: int) -> Kind:
        """A copy of what a user has now: full-model names, float32, on the CPU."""
        start = self._starts[user]
        if isinstance(start, LoraAdapter):
            return replace(start, pairs={name: _own(stack, user) for name, stack in self._stacks.items()})
        cores = {name: _here(stack.core, user) for name, stack in self._stacks.items()}
        own = {name: _own(stack, user) for name, stack in self._stacks.items() if stack.A is not None}
        basis = self.basis() if self._learns else start.basis
        core = replace(start.core, basis_id=basis.id, cores=cores, own=own)
        return replace(start, core=core, basis=basis)


def _copy(stacked: Tensor | None) -> Tensor:
    assert stacked is not None
    return stacked.detach().clone()


def _gradient(side: Tensor) -> Tensor:
    return torch.zeros_like(side, device="cpu") if side.grad is None else side.grad.detach().cpu().clone()


def _here(stacked: Tensor | None, user: int) -> Tensor:
    assert stacked is not None
    return stacked.detach()[user].to("cpu", copy=True)


def _own(stack: Stack, user: int) -> LoraPair:
    return LoraPair(_here(stack.A, user), _here(stack.B, user))


def _stacks(starts: Sequence[LoraAdapter | CoreInBasis], device: torch.device) -> dict[str, Stack]:
    _one_and_the_same("a", [type(start).__name__ for start in starts])
    placed = [start for start in starts if isinstance(start, CoreInBasis)]
    return (
        _core_stacks(placed, device)
        if placed
        else _lora_stacks([start for start in starts if isinstance(start, LoraAdapter)], device)
    )


def _lora_stacks(starts: Sequence[LoraAdapter], device: torch.device) -> dict[str, Stack]:
    names = _one_and_the_same("modules", [tuple(start.pairs) for start in starts])
    each = {name: [start.pairs[name] for start in starts] for name in names}
    return {name: _stacked(pairs, name, device) for name, pairs in each.items()}


def _core_stacks(starts: Sequence[CoreInBasis], device: torch.device) -> dict[str, Stack]:
    _one_and_the_same("the basis", [start.basis.id for start in starts])
    _one_and_the_same("modules with ranks of their own", [tuple(sorted(start.core.own)) for start in starts])
    basis, own, stacks = starts[0].basis, starts[0].core.own, {}
    for name, (u, v) in basis.sides.items():
        pairs = [start.core.own[name] for start in starts] if name in own else []
        stacks[name] = replace(
            _stacked(pairs, name, device),
            basis=(u.to(device, torch.float32), v.to(device, torch.float32)),
            core=_parameter([start.core.cores[name] for start in starts], device),
        )
    return stacks


def _stacked(pairs: Sequence[LoraPair], name: str, device: torch.device) -> Stack:
    """Pairs of one module; nothing where there are none."""
    if not pairs:
        return Stack()
    _one_and_the_same(f"{name}: the rank", [pair.rank for pair in pairs])
    A, B = ([getattr(pair, side) for pair in pairs] for side in "AB")
    return Stack(A=_parameter(A, device), B=_parameter(B, device))


def _parameter(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A copy, float32, that gradients reach."""
    return torch.stack([one.detach().to(device, torch.float32) for one in tensors]).requires_grad_()


_T = TypeVar("_T")


def _one_and_the_same(what: str, found: Sequence[_T]) -> _T:
    for number, one in enumerate(found):
        if one != found[0]:
            raise AdapterError(
                f"user {number} of {len(found)} trained together: {what} {one}, the first has {found[0]}"
            )
    return found[0]
