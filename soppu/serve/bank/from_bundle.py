"""From a bundle to the tensors its users are served with, page by page. Not for applying them: `routing`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle, Matrices
from soppu.compress.bundle.shelf import Shelf, few
from soppu.compress.codec.basis import Bases
from soppu.compress.numbers.components import Components, ordinals
from soppu.serve.layers import kernels
from soppu.serve.layers.factors import ModuleFactors, OwnNumbers, SharedFactors, Stack
from soppu.serve.layers.frame import Frame
from soppu.serve.layers.kernels import Kernel, Sides
from soppu.serve.layers.records import Records, pack

# (module name, tensor) -> the tensor on that layer's device, in the type the layer computes in
Cast = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """How a bundle is read.

    `cuts`: the outputs and inputs of a module that a tensor-parallel rank holds, where these are not all.
    `thin`: a user with few components in a wide basis gets a record too, which is less than half of a core.
    """

    cuts: Mapping[str, tuple[range, range]] = field(default_factory=dict)
    thin: bool = False

    def cut(self, shapes: Mapping[str, tuple[int, int]]) -> list[tuple[range, range]]:
        """The outputs and inputs that are read of each of these modules."""
        return [self.cuts.get(name, (range(o), range(i))) for name, (o, i) in shapes.items()]


def ranks(bases: Mapping[str, Sequence[Bases]]) -> tuple[tuple[int, int], ...]:
    """(k_out, k_in) of every module's bases, which all clusters share."""
    return tuple((clusters[0][0].k, clusters[0][1].k) for clusters in bases.values())


def read(bundle: Bundle, *, cast: Cast, how: Reading | None = None) -> dict[str, ModuleFactors]:
    """Module -> what the bundle's users change there, without modules that nobody changes.

    A user whose components at a module all lie in the bases of the user's cluster is served through those;
    a user with other components there is served by a record of all of them. Decodes every page once, all
    users together. O(w (o + i)) for w components.

    Raises:
        BundleError: a damaged page.
    """
    how = how or Reading()
    collected = {name: _Collected(name, bundle, cast, how) for name in bundle.shapes}
    pages = []
    for number, page in enumerate(bundle.pages):
        parts = [
            collected[name].add(part)
            for name, part in zip(bundle.shapes, bundle.components(number), strict=True)
        ]
        numbers = torch.arange(len(bundle.users)) - page.first
        pages.append(_records(bundle, [part.renumbered(numbers) for part in parts], page.users, how))
    records = Records.join(pages)
    # popped, so that a module's components are freed before the next module's factors are built
    modules = {
        name: collected.pop(name).factors(records, number) for number, name in enumerate(list(bundle.shapes))
    }
    return _stacked({name: factors for name, factors in modules.items() if factors.shared or factors.own})


def frame(shelf: Shelf, *, cast: Cast) -> Frame:
    """A bundle's modules for users who are read one at a time: the bases of all clusters. O(bases)."""
    nobody = Records.empty(0, tuple(shelf.shapes.values()), ranks(shelf.bases))
    modules = {}
    for number, name in enumerate(shelf.shapes):
        pairs = (shelf.matrices(name, cluster) for cluster in range(shelf.clusters))
        bases = {
            cluster: (None if U is None else cast(name, U), None if V is None else cast(name, V))
            for cluster, (U, V) in enumerate(pairs)
        }
        like = cast(name, torch.zeros(0))
        own = OwnNumbers(nobody, number, bases, _kernel(like), like)
        modules[name] = ModuleFactors({}, torch.zeros(0, dtype=torch.int64), own, bases)
    return Frame(modules)


def _kernel(like: Tensor) -> Kernel | None:
    """What adds records to layers of this type; None where they are widened."""
    kernel = kernels.choose("auto", device=like.device, dtype=like.dtype)
    return None if kernel is kernels.plain else kernel


def _records(bundle: Bundle, parts: Sequence[Components], users: int, how: Reading) -> Records:
    return pack(parts, users=users, cuts=how.cut(bundle.shapes), ranks=ranks(bundle.bases))


def unchanged(bundle: Bundle) -> set[str]:
    """Users whose adapter as stored changes nothing: the base model answers for them.

    O(n (o + i) k) for each module until a user is known to change something.

    Raises:
        BundleError: a damaged page.
    """
    changed = torch.zeros(len(bundle.users), dtype=torch.bool)
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            for cluster, here in _by_cluster(bundle, _scaled(bundle, part.select(~changed[part.user]))):
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
    """One module's components in the pages so far: coordinates by cluster, and what records refer to."""

    name: str
    bundle: Bundle
    cast: Cast
    how: Reading
    shared: dict[int, list[_Rows]] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)  # clusters whose output basis records refer to
    right: set[int] = field(default_factory=set)
    recorded: bool = False

    def add(self, part: Components) -> Components:
        """Take the components of one page; those that go into records are given back."""
        part = _scaled(self.bundle, part)
        apart = torch.isin(part.user, part.user[part.own]) | self._few(part)
        own, rest = _where(part, apart), _where(part, ~apart)
        self.recorded |= len(own) > 0
        clusters = self.bundle.cluster[own.user]
        self.left |= set(clusters[own.left.coords_width > 0].unique().tolist())
        self.right |= set(clusters[own.right.coords_width > 0].unique().tolist())
        for cluster, here in _by_cluster(self.bundle, rest):
            out, inn = self.bundle.bases[self.name][cluster]
            left = here.left.coordinates(out.k) * here.gain[:, None]
            rows = _Rows(here.user, left, here.right.coordinates(inn.k))
            self.shared.setdefault(cluster, []).append(rows)
        return own

    def _few(self, part: Components) -> Tensor:
        """(m,) whether a component is one of so few of its user that a core would be mostly zeros."""
        out, inn = self.bundle.bases[self.name][0]
        counts = torch.bincount(part.user)[part.user] if len(part) else part.user
        return few(counts, k_out=out.k, k_in=inn.k) & self.how.thin

    def factors(self, records: Records, number: int) -> ModuleFactors:
        """What was collected, in the form the layer uses; `number` is the module's in the records."""
        users = len(self.bundle.users)
        place, shared = torch.full((users,), -1), {}
        bases = dict[int, Sides]()
        some = self.shared.keys() | self.left | self.right
        for cluster in sorted(some):
            U, V = self.bundle.matrices(self.name, cluster)
            whole = cluster in self.shared
            bases[cluster] = (
                None if U is None or not (whole or cluster in self.left) else self._cast(U),
                None if V is None or not (whole or cluster in self.right) else self._cast(V),
            )
        for cluster, parts in self.shared.items():
            members, P, Q = _cores(_join(parts))
            place[members] = torch.arange(len(members))
            U, V = bases[cluster]
            assert U is not None and V is not None  # coordinates without a basis are refused with the page
            Q = None if Q is None else self._cast(Q)
            shared[cluster] = SharedFactors(U=U, V=V, P=self._cast(P), Q=Q)
        own = self._own(records, number, bases) if self.recorded else None
        return ModuleFactors(shared, place, own, bases)

    def _own(self, records: Records, number: int, bases: Mapping[int, Sides]) -> OwnNumbers:
        like = self._cast(torch.zeros(0))
        return OwnNumbers(records, number, bases, _kernel(like), like)

    def _cast(self, tensor: Tensor) -> Tensor:
        return self.cast(self.name, tensor)


def _scaled(bundle: Bundle, part: Components) -> Components:
    """Norms multiplied into the gains; components of gain 0 are left out."""
    part = replace(part, gain=part.gain * bundle.norm[part.user])
    return _where(part, part.gain != 0)


def _where(part: Components, some: Tensor) -> Components:
    """`part.select(some)`; without a copy where that is all of it."""
    return part if bool(some.all()) else part.select(some)


def _by_cluster(bundle: Bundle, part: Components) -> Iterator[tuple[int, Components]]:
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
    P = torch.stack([part.P for part in parts])
    stack = Stack(P, torch.stack(Q) if Q else None, kernel=_kernel(P))
    for number, ((name, cluster), part) in enumerate(zip(members, parts, strict=True)):
        view = None if stack.Q is None else stack.Q[number]
        shared = factors[name].shared
        assert isinstance(shared, dict)  # copied so above
        shared[cluster] = replace(part, P=stack.P[number], Q=view, stack=stack, number=number)
