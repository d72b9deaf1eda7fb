"""From a bundle to the tensors its users are served with, page by page. Not for applying them: `routing`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle, Matrices
from soppu.compress.numbers.components import Components, ordinals
from soppu.serve.layers.factors import ModuleFactors, OwnRows, SharedFactors, Stack

# (module name, tensor) -> the tensor on that layer's device, in the type the layer computes in
Cast = Callable[[str, Tensor], Tensor]


def read(bundle: Bundle, *, cast: Cast) -> dict[str, ModuleFactors]:
    """Module -> what the bundle's users change there, without modules that nobody changes.

    A user whose components at a module all lie in the bases of the user's cluster is served through those;
    a user with other components there is served by a LoRA pair of all of them. Decodes every page once, all
    users together. O(w (o + i) k) for w components.

    Raises:
        BundleError: a damaged page.
    """
    collected = {name: _Collected(name, bundle, cast) for name in bundle.shapes}
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            collected[name].add(part)
    # popped, so that a module's components are freed before the next module's factors are built
    modules = {name: collected.pop(name).factors() for name in bundle.shapes}
    return _stacked({name: factors for name, factors in modules.items() if factors.shared or factors.own})


def unchanged(bundle: Bundle) -> set[str]:
    """Users whose adapter as stored changes nothing: the base model answers for them.

    O(n (o + i) k) for each module until a user is known to change something.

    Raises:
        BundleError: a damaged page.
    """
    changed = torch.zeros(len(bundle.users), dtype=torch.bool)
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            for cluster, here in _weighted(bundle, part.select(~changed[part.user])):
                rows = _vectors(here, bundle.matrices(name, cluster))
                changed[rows.user[rows.left.any(1) & rows.right.any(1)]] = True
    return {user for user, some in zip(bundle.users, changed.tolist(), strict=True) if not some}


@dataclass(frozen=True, eq=False)
class _Rows:
    """The two sides of w components, weights folded in: left (w, o or k_out), right (w, i or k_in)."""

    user: Tensor
    left: Tensor
    right: Tensor


@dataclass(eq=False)
class _Collected:
    """One module's components in the pages so far: coordinates by cluster, and the vectors of own pairs."""

    name: str
    bundle: Bundle
    cast: Cast
    shared: dict[int, list[_Rows]] = field(default_factory=dict)
    own: list[_Rows] = field(default_factory=list)

    def add(self, part: Components) -> None:
        """The components of one page."""
        for cluster, here in _weighted(self.bundle, part):
            apart = torch.isin(here.user, here.user[here.own])
            if bool(apart.any()):
                rows = _vectors(here.select(apart), self.bundle.matrices(self.name, cluster))
                # cast now: in float32 these take the most memory of all
                self.own.append(replace(rows, left=self._cast(rows.left), right=self._cast(rows.right)))
            if not bool(apart.all()):
                out, inn = self.bundle.bases[self.name][cluster]
                rest = here.select(~apart)
                left = rest.left.coordinates(out.k) * rest.gain[:, None]
                rows = _Rows(rest.user, left, rest.right.coordinates(inn.k))
                self.shared.setdefault(cluster, []).append(rows)

    def factors(self) -> ModuleFactors:
        """What was collected, in the form the layer uses."""
        users = len(self.bundle.users)
        place, shared = torch.full((users,), -1), {}
        for cluster, parts in self.shared.items():
            members, P, Q = _cores(_join(parts))
            place[members] = torch.arange(len(members))
            U, V = self.bundle.matrices(self.name, cluster)
            assert U is not None and V is not None  # coordinates without a basis are refused with the page
            Q = None if Q is None else self._cast(Q)
            shared[cluster] = SharedFactors(U=self._cast(U), V=self._cast(V), P=self._cast(P), Q=Q)
        return ModuleFactors(shared, place, _own(_join(self.own), users) if self.own else None)

    def _cast(self, tensor: Tensor) -> Tensor:
        return self.cast(self.name, tensor)


def _weighted(bundle: Bundle, part: Components) -> Iterator[tuple[int, Components]]:
    """Cluster by cluster, norms multiplied into the gains; components of gain 0 are left out."""
    part = replace(part, gain=part.gain * bundle.norm[part.user])
    part = part.select(part.gain != 0)
    clusters = bundle.cluster[part.user]
    for cluster in clusters.unique().tolist():
        yield cluster, part.select(clusters == cluster)


def _vectors(part: Components, bases: Matrices) -> _Rows:
    """The components as rows of a LoRA pair, the weight shared evenly: no factor leaves a 16-bit range."""
    root = part.gain.abs().sqrt()
    left = part.left.vectors(bases[0]) * (root * part.gain.sign())[:, None]
    return _Rows(part.user, left, part.right.vectors(bases[1]) * root[:, None])


def _join(parts: Sequence[_Rows]) -> _Rows:
    user, left, right = ([getattr(part, name) for part in parts] for name in ("user", "left", "right"))
    return _Rows(torch.cat(user), torch.cat(left), torch.cat(right))


def _cores(rows: _Rows) -> tuple[Tensor, Tensor, Tensor | None]:
    """Users in order, P (m, k_out, c) and Q (m, c, k_in); full cores and None where these are fewer numbers.

    c is the largest number of components a user has. A token costs a multiplication a number.
    """
    users, owner, counts = torch.unique(rows.user, return_inverse=True, return_counts=True)
    c, k_out, k_in = int(counts.max()), rows.left.shape[1], rows.right.shape[1]
    ordinal = ordinals(owner)
    left, right = rows.left.new_zeros(len(users), c, k_out), rows.right.new_zeros(len(users), c, k_in)
    left[owner, ordinal] = rows.left
    right[owner, ordinal] = rows.right
    if k_out * k_in < c * (k_out + k_in):
        return users, left.mT @ right, None
    return users, left.mT, right


def _own(rows: _Rows, users: int) -> OwnRows:
    """The rows sorted by user: within a page they come cluster by cluster."""
    order = torch.argsort(rows.user, stable=True).to(rows.left.device)
    starts = torch.zeros(users + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(rows.user, minlength=users).cumsum(0)
    return OwnRows(A=rows.right[order], B=rows.left[order], starts=starts)


def _stacked(factors: Mapping[str, ModuleFactors]) -> dict[str, ModuleFactors]:
    """The same factors, cores of one shape and one set of users in one `Stack`, their parts views of it.

    Equal `place` tensors become one. O(numbers in the cores); at most one stack is in memory twice.
    """
    copies, places = dict[str, ModuleFactors](), dict[bytes, Tensor]()
    alike: dict[Hashable, list[tuple[str, int]]] = {}
    for name, module in factors.items():
        place = places.setdefault(module.place.numpy().tobytes(), module.place)
        copies[name] = replace(module, place=place, shared=dict(module.shared))
        for cluster, shared in module.shared.items():
            Q = None if shared.Q is None else shared.Q.shape
            kind = cluster, id(place), shared.P.shape, Q, shared.P.dtype, shared.P.device
            alike.setdefault(kind, []).append((name, cluster))
    for members in alike.values():
        _stack(copies, members)
    return copies


def _stack(factors: Mapping[str, ModuleFactors], members: list[tuple[str, int]]) -> None:
    parts = [factors[name].shared[cluster] for name, cluster in members]
    Q = [part.Q for part in parts if part.Q is not None]
    stack = Stack(torch.stack([part.P for part in parts]), torch.stack(Q) if Q else None)
    for number, ((name, cluster), part) in enumerate(zip(members, parts, strict=True)):
        view = None if stack.Q is None else stack.Q[number]
        shared = factors[name].shared
        assert isinstance(shared, dict)  # copied so above
        shared[cluster] = replace(part, P=stack.P[number], Q=view, stack=stack, number=number)
