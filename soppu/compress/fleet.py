"""The adapters of many users, checked and handed out a batch of users at a time. Not for compressing them.

Nothing here holds more than a batch: adapters may come from a mapping that reads each when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, validate
from soppu.compress import heap
from soppu.compress.joint import LARGEST_NORM, SMALLEST_NORM
from soppu.errors import AdapterError

_BATCH_NUMBERS = 1 << 24  # of factors held at a time: 64 MiB in float32
_MOST_USERS = 64
_EPS = torch.finfo(torch.float64).eps
_CANCELLED = 1e-5


@dataclass(frozen=True, eq=False)
class Batch:
    """Some consecutive users: module -> B (b, o, r) and A (b, r, i), narrow adapters padded with zeros."""

    first: int
    size: int
    factors: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Fleet:
    """What a first look at all adapters found out.

    Attributes:
        adapters: user -> adapter; looked up once for every pass.
        adapter_ids: an id for each user, in order.
        shapes: module -> (o, i), modules in order.
        ranks: (modules, n) rank of every user's own adapter, 0 where a user does not have the module.
        norms: (modules, n) float64 Frobenius norms; 0 where a delta is zero or round-off.
        device: where batches are put.
    """

    adapters: Mapping[str, LoraAdapter]
    adapter_ids: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Tensor
    norms: Tensor
    device: torch.device
    base_model: str
    base_hash: str
    fan_in_fan_out: bool
    parameters: int

    @property
    def users(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.adapters)

    @property
    def norm(self) -> Tensor:
        """(n,) float64 norm of every user's whole adapter."""
        return self.norms.square().sum(0).sqrt()

    def batches(self, *, only: Tensor | None = None) -> Iterator[Batch]:
        """All users in order, a batch at a time; `only` (n,) leaves out batches without such a user."""
        row = sum((o + i) * int(self.ranks[m].max()) for m, (o, i) in enumerate(self.shapes.values()))
        size = max(1, min(_MOST_USERS, _BATCH_NUMBERS // max(row, 1)))
        users = self.users
        for first in range(0, len(users), size):
            part = users[first : first + size]
            if only is not None and not bool(only[first : first + size].any()):
                continue
            yield Batch(first, len(part), self._stacked(part))
            if size < len(users):  # one batch, as of a new user alone, leaves no holes between batches
                heap.trim()

    def _stacked(self, users: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        held = [self.adapters[user] for user in users]
        return {name: self._stack(held, m) for m, name in enumerate(self.shapes)}

    def _stack(self, held: list[LoraAdapter], module: int) -> tuple[Tensor, Tensor]:
        name = list(self.shapes)[module]
        o, i = self.shapes[name]
        width = max(int(self.ranks[module].max()), 1)
        B = torch.zeros((len(held), o, width), device=self.device)
        A = torch.zeros((len(held), width, i), device=self.device)
        for row, adapter in enumerate(held):
            pair = adapter.pairs.get(name)
            if pair is not None:
                B[row, :, : pair.rank] = pair.B
                A[row, : pair.rank] = pair.A
        return B, A


def survey(
    adapters: Mapping[str, LoraAdapter],
    *,
    adapter_ids: Mapping[str, str] | None = None,
    device: torch.device,
) -> Fleet:
    """Look at every adapter once: do they belong together, how large are they. O(n (o + i) r^2) a module.

    Raises:
        AdapterError: no adapters, a malformed one, or two that differ in base model or in a module's shape.
    """
    if not adapters:
        raise AdapterError("no adapters to compress; at least one is needed")
    first_user, first = next(iter(adapters.items()))
    seen: dict[str, tuple[str, int, int]] = {}
    rows: list[dict[str, tuple[int, float]]] = []
    ids, parameters = [], 0
    for user, adapter in adapters.items():
        validate(adapter, who=user)
        _check_base(user, adapter, first_user, first)
        rows.append({name: _look(user, name, adapter, seen) for name in adapter.pairs})
        ids.append(_id(user, adapter, adapter_ids))
        parameters += adapter.parameters()
    names = sorted(seen)
    table = [[row.get(name, (0, 0.0)) for row in rows] for name in names]
    return Fleet(
        adapters=adapters,
        adapter_ids=tuple(ids),
        shapes={name: seen[name][1:] for name in names},
        ranks=torch.tensor([[rank for rank, _ in row] for row in table]),
        norms=torch.tensor([[norm for _, norm in row] for row in table], dtype=torch.float64),
        device=device,
        base_model=first.base_model,
        base_hash=first.base_hash,
        fan_in_fan_out=first.fan_in_fan_out,
        parameters=parameters,
    )


def _look(
    user: str, name: str, adapter: LoraAdapter, seen: dict[str, tuple[str, int, int]]
) -> tuple[int, float]:
    """Rank and norm of one delta; its shape is held against that of earlier users."""
    pair = adapter.pairs[name]
    o, r, i = int(pair.B.shape[0]), pair.rank, int(pair.A.shape[1])
    if r == 0:
        raise AdapterError(f"{user}: {name}: rank 0, expected 1 or more")
    other, *expected = seen.setdefault(name, (user, o, i))
    if [o, i] != expected:
        raise AdapterError(f"{name}: {user} changes {(o, i)}, {other} changes {tuple(expected)}")
    norm = delta_norm(pair.B, pair.A)
    if not norm <= LARGEST_NORM:
        raise AdapterError(f"{user}: {name}: norm {norm:.3g}, allowed: up to {LARGEST_NORM:.3g}")
    return r, norm


def delta_norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of B A; 0 for a delta that is nothing but the round-off of its factors. O((o + i)
    r^2).
    """
    left, right = B.double(), A.double()
    grams = left.mT @ left, right @ right.mT
    size = float((grams[0].trace() * grams[1].trace()).sqrt())
    norm = float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())
    if norm < _CANCELLED * size:  # a sum of squares has lost the digits that triangular factors keep
        roots = [torch.linalg.qr(side, mode="r").R for side in (left, right.mT)]
        norm = float(torch.linalg.matrix_norm(roots[0] @ roots[1].mT))
    return norm if norm > max(8 * _EPS * size, SMALLEST_NORM) else 0.0


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


def _id(user: str, adapter: LoraAdapter, given: Mapping[str, str] | None) -> str:
    """The id given for the user, or else the registry's id of the adapter's content."""
    if given is None:
        return f"a-{adapter.content_hash()[:16]}"
    if user not in given:
        raise AdapterError(f"{user}: adapter_ids holds no id for this user")
    return given[user]
