"""The adapters of many users, checked and handed out a batch of users at a time.

Nothing here holds more than a batch: adapters may come from a mapping that reads each when it is asked for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soppu import base_identity
from soppu.adapter import LoraAdapter, validate
from soppu.base_identity import Base
from soppu.compress.linalg.tucker import LARGEST_NORM, SMALLEST_NORM
from soppu.errors import AdapterError

_BATCH_NUMBERS = 1 << 24  # of factors held at a time: 64 MiB in float32
_TRIM_NUMBERS = 3 << 22  # of factors read and dropped between two trims: 48 MiB
_MOST_USERS = 64
_EPS = torch.finfo(torch.float64).eps
_CANCELLED = 1e-5


class Batch:
    """Some consecutive users; their adapters are read when factors are first asked for, and then held."""

    def __init__(self, fleet: Fleet, first: int, users: tuple[str, ...]) -> None:
        self.first, self.size = first, len(users)
        self._fleet, self._users = fleet, users
        self.held: list[LoraAdapter] | None = None

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (b, o, r) and A (b, r, i), narrow adapters padded with zeros. Copied anew at every call."""
        if self.held is None:
            self.held = [self._fleet.adapters[user] for user in self._users]
        (o, i), ranks = self._fleet.shapes[module], self._fleet.ranks[list(self._fleet.shapes).index(module)]
        width = max(int(ranks.max()), 1)  # the largest rank in the fleet
        make = torch.zeros if bool((ranks < width).any()) else torch.empty
        # columns lie together, as those of a canonical form do
        B = make((self.size, width, o), device=self._fleet.device).mT
        A = make((self.size, width, i), device=self._fleet.device)
        for row, adapter in enumerate(self.held):
            pair = adapter.pairs.get(module)
            if pair is not None:
                B[row : row + 1, :, : pair.rank] = pair.B[None]  # torch turns a lone matrix in one thread
                A[row, : pair.rank] = pair.A
        return B, A


@dataclass(frozen=True, eq=False)
class Fleet:
    """What a first look at all adapters found out."""

    adapters: Mapping[str, LoraAdapter]  # looked up once for every pass at most
    adapter_ids: tuple[str, ...]  # an id for each user, in order
    shapes: Mapping[str, tuple[int, int]]  # module -> (o, i), modules in order
    ranks: Tensor  # (modules, n) of every user's own adapter, 0 where a user does not have the module
    norms: Tensor  # (modules, n) float64 Frobenius norms; 0 where a delta is zero or round-off
    device: torch.device  # where batches are put
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

    @property
    def batch_size(self) -> int:
        """Users of a batch; the last may have fewer."""
        return max(1, min(_MOST_USERS, _BATCH_NUMBERS // max(self._row, 1)))

    @property
    def _row(self) -> int:
        """Numbers of a user's factors, padded."""
        return sum((o + i) * int(self.ranks[m].max()) for m, (o, i) in enumerate(self.shapes.values()))

    @property
    def batch_count(self) -> int:
        """Batches of a pass."""
        return -(-len(self.adapters) // self.batch_size)

    def batches(self) -> Iterator[Batch]:
        """All users in order, a batch at a time."""
        users, size, freed = self.users, self.batch_size, 0
        for first in range(0, len(users), size):
            batch = Batch(self, first, users[first : first + size])
            yield batch
            freed += batch.size * self._row if batch.held else 0
            if freed >= _TRIM_NUMBERS and size < len(users):  # memory given back has to be faulted in again
                trim_heap()
                freed = 0
        if freed and size < len(users):  # one batch, as of a new user alone, leaves no holes
            trim_heap()


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
    first: tuple[str, LoraAdapter] | None = None
    base = Base()
    seen: dict[str, tuple[str, int, int]] = {}
    rows: list[dict[str, tuple[int, float]]] = []
    ids, parameters = [], 0
    for user, adapter in adapters.items():
        validate(adapter, who=user)
        first = first or (user, adapter)
        base = _joined(base, user, adapter, *first)
        rows.append({name: _look(user, name, adapter, seen) for name in adapter.pairs})
        ids.append(_id(user, adapter, adapter_ids))
        parameters += adapter.parameters()
    assert first is not None
    names, like = sorted(seen), first[1]
    table = [[row.get(name, (0, 0.0)) for row in rows] for name in names]
    return Fleet(
        adapters=adapters,
        adapter_ids=tuple(ids),
        shapes={name: seen[name][1:] for name in names},
        ranks=torch.tensor([[rank for rank, _ in row] for row in table]),
        norms=torch.tensor([[norm for _, norm in row] for row in table], dtype=torch.float64),
        device=device,
        base_model=base.name,
        base_hash=base.hash,
        fan_in_fan_out=like.fan_in_fan_out,
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


def _joined(base: Base, user: str, adapter: LoraAdapter, first_user: str, first: LoraAdapter) -> Base:
    """What is known of the base model once this adapter was seen, of whom `first` was the first."""
    if adapter is not first:
        base_identity.check(adapter.base, base, who=user, whose=f"{first_user} for")
    if adapter.fan_in_fan_out != first.fan_in_fan_out:
        raise AdapterError(
            f"fan_in_fan_out: {user} has {adapter.fan_in_fan_out}, {first_user} has {first.fan_in_fan_out}"
        )
    return base.joined(adapter.base)


def _id(user: str, adapter: LoraAdapter, given: Mapping[str, str] | None) -> str:
    """The id given for the user, or else the registry's id of the adapter's content."""
    if given is None:
        return f"a-{adapter.content_hash()[:16]}"
    if user not in given:
        raise AdapterError(f"{user}: adapter_ids holds no id for this user")
    return given[user]


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere nothing. Milliseconds.

    glibc puts blocks of up to 32 MiB on a heap that by itself shrinks only at its end. Batch after batch a
    small block that stays keeps a large hole from being given back, and a process grows by what it does not
    use.
    """
    library = _c_library()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@cache
def _c_library() -> Any:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
