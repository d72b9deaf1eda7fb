"""Shelf: a bundle whose users are taken out one at a time. Not for all of them at once: `bundle`.

What is checked when: a file's SHA-256, content digest and metadata where it is first opened (`index`); that
it is still that file, by size, time and header, at each opening; a page's checksum, its streams, and what its
user can have, each time a user of it is decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from reprlib import repr as show
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soppu.base_identity import Base
from soppu.compress.bundle import container, index
from soppu.compress.bundle.bundle import Bundle, Matrices
from soppu.compress.bundle.stored import StoredFile
from soppu.compress.bundle.users import Users
from soppu.compress.codec import page
from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import page_shapes
from soppu.compress.numbers.components import Components
from soppu.errors import BundleError

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Survey:
    """What all users of a bundle together have. A user is apart at a module where the user has numbers of
    their own, or so few components that a core would be mostly zeros: those are served by records.
    """

    modules: tuple[str, ...]
    most: NDArray[np.int64]  # (modules,) the most components of a user who is apart there
    cored: NDArray[np.bool_]  # (modules,) whether there is a user who is not
    own: NDArray[np.bool_]  # (modules,) whether anybody has numbers of their own
    floats: bool  # whether any numbers of those apart are floats

    @property
    def changed(self) -> frozenset[str]:
        """Modules that anybody changes."""
        return frozenset(np.array(self.modules)[(self.most > 0) | self.cored].tolist())


@dataclass(frozen=True, eq=False)
class Shelf:
    """The users of a bundle, on a disk or in memory. Every method may be called from any thread."""

    users: Users
    base: Base
    shapes: Mapping[str, tuple[int, int]]  # full-model module name -> (o, i), in order
    bases: Mapping[str, Sequence[Bases]]  # module -> output and input basis of every cluster
    worst_error: float  # the largest relative error of a user
    _arrays: Arrays = field(repr=False)  # norm, cluster, ranks, firsts; see `index.Index`
    _read: Callable[[int], bytes] = field(repr=False)  # the bytes of a page; BundleError
    source: str = "bundle"
    bundle_id: str = ""  # "" where it was not read from a file

    @classmethod
    def open(cls, path: Path, *, expected_hash: str = "") -> Shelf:
        """A bundle file. O(bases) where it was opened before and its index is there, else O(size) once.

        Raises:
            BundleError: no such file, not a bundle, damaged, or another bundle than `expected_hash` names.
        """
        stored = StoredFile(path)
        found = index.of(stored, expected_hash=expected_hash)
        head, arrays = found.head, found.arrays
        begin, size, checksum = head["bases"]
        data = stored.read(begin, size)
        if zlib.crc32(data) != checksum:
            raise BundleError(f"{path}: bases: damaged since the file was checked")

        def read(number: int) -> bytes:
            data = stored.read(int(arrays["begins"][number]), int(arrays["sizes"][number]))
            if zlib.crc32(data) != int(arrays["sums"][number]):
                raise BundleError("damaged since the file was checked")
            return data

        return cls(
            Users(arrays),
            Base(head["base_model"], head["base_hash"]),
            {entry["name"]: (entry["out"], entry["in"]) for entry in head["modules"]},
            container.decode_bases(head, data, str(path)),
            head["worst_error"],
            arrays,
            read,
            f"bundle {head['bundle_id'][:12]}",
            head["bundle_id"],
        )

    @classmethod
    def of(cls, bundle: Bundle) -> Shelf:
        """A bundle in memory. O(n)."""
        arrays = {
            "norm": bundle.norm.numpy(),
            "cluster": bundle.cluster.numpy(),
            "ranks": bundle.ranks.numpy().T,
            "firsts": np.cumsum([0, *(held.users for held in bundle.pages)]),
        }
        worst = max(bundle.report.relative_error.values(), default=0.0)
        users, pages = Users.of(bundle.users), [held.data for held in bundle.pages]
        return cls(users, bundle.base, bundle.shapes, bundle.bases, worst, arrays, lambda n: pages[n])

    @property
    def clusters(self) -> int:
        """Bases that every module has."""
        return len(next(iter(self.bases.values())))

    def cluster(self, place: int) -> int:
        """Whose bases a user's coordinates refer to."""
        return int(self._arrays["cluster"][place])

    @cached_property
    def survey(self) -> Survey:
        """What all users together have, by module. Reads every page, but not its numbers. O(components).

        Raises:
            BundleError: a damaged page.
        """
        firsts, modules = self._arrays["firsts"].tolist(), len(self.shapes)
        pairs = [clusters[0] for clusters in self.bases.values()]
        k = np.array([(out.k, inn.k) for out, inn in pairs])
        most, floats = np.zeros(modules, np.int64), False
        cored, own = np.zeros(modules, np.bool_), np.zeros(modules, np.bool_)
        for number, (first, end) in enumerate(zip(firsts, firsts[1:], strict=False)):
            where = f"{self.source}: page {number}"
            try:
                found = page.survey(self._read(number), modules=modules, users=end - first, source=where)
            except BundleError as error:
                raise BundleError(f"{where}: {error}") from None
            apart = (found.own > 0) | few(found.counts, k_out=k[:, :1], k_in=k[:, 1:])
            most = np.maximum(most, np.where(apart, found.counts, 0).max(1))
            cored |= (~apart & (found.counts > 0)).any(1)
            floats |= bool((found.floats * apart).any())
            own |= (found.own > 0).any(1)
        return Survey(tuple(self.shapes), most, cored, own, floats)

    def matrices(self, name: str, cluster: int = 0) -> Matrices:
        """U (o, k) and V (i, k) float32 of a module and a cluster, None where a side has no basis."""
        return self._matrices[name][cluster]

    def components(self, place: int) -> list[Components]:
        """One user's components, numbered 0, at every module, the user's norm in the gains. O(page).

        Raises:
            BundleError: the page is damaged, or says what cannot be; the message names the user and it.
        """
        number, everybody = self._page(place)
        parts = self._decoded(number, everybody, range(place, place + 1))
        return [_scaled(part, float(self._arrays["norm"][place])) for part in parts]

    def check(self, place: int) -> range:
        """Decode a user's page, with everybody's numbers where they are sound; the users that are. O(page).

        Raises:
            BundleError: as `components`, for this user.
        """
        number, everybody = self._page(place)
        try:
            self._decoded(number, everybody, everybody)
        except BundleError:
            self.components(place)
            return range(place, place + 1)
        return everybody

    def _page(self, place: int) -> tuple[int, range]:
        """The page of a user, and all users in it."""
        firsts = self._arrays["firsts"]
        number = int(np.searchsorted(firsts, place, side="right")) - 1
        return number, range(int(firsts[number]), int(firsts[number + 1]))

    def _decoded(self, number: int, everybody: range, asked: range) -> list[Components]:
        """What one user of a page has, or everybody in it, numbered from 0."""
        users, first = len(everybody), asked[0]
        who = f"{self.source}: user {show(self.users[first])}: page {number}"
        only = first - everybody[0] if len(asked) == 1 else None
        try:
            parts = page.decode(
                self._read(number), self._shapes, users=users, first=0, source="its bytes", only=only
            )
        except BundleError as error:
            raise BundleError(f"{who}: {error}") from None
        if only is not None:
            parts = [part.renumbered(torch.zeros(users, dtype=torch.int64)) for part in parts]
        norm = torch.from_numpy(self._arrays["norm"][asked.start : asked.stop].astype(np.float32))
        ranks = torch.from_numpy(self._arrays["ranks"][asked.start : asked.stop].astype(np.int64)).mT
        names = self.users[asked.start : asked.stop]
        container.check_parts(parts, container.Held(self.shapes, self.bases, ranks, norm, names), source=who)
        return parts

    @cached_property
    def _shapes(self) -> list[page.ModuleShape]:
        return page_shapes(self.shapes, self.bases)

    @cached_property
    def _matrices(self) -> dict[str, tuple[Matrices, ...]]:
        return {
            name: tuple((out.matrix(), inn.matrix()) for out, inn in clusters)
            for name, clusters in self.bases.items()
        }


def few(count: Any, *, k_out: Any, k_in: Any) -> Any:
    """Whether a core of these ranks would have twice the numbers of so many components, or more.

    Of numbers, arrays or tensors alike.
    """
    return 2 * count * (k_out + k_in) <= k_out * k_in


def _scaled(part: Components, norm: float) -> Components:
    """The norm multiplied into the gains; components of gain 0 are left out."""
    part = Components(part.user, part.gain * norm, part.left, part.right)
    return part if bool((part.gain != 0).all()) else part.select(part.gain != 0)
