"""Bundle: all users' compressed adapters, and the one file they are stored in.

`bundle.envelope` makes and checks the bytes of the file, `page` and `basis` those of its parts,
`schema` what its metadata claims; docs/format.md describes all of it for readers in other languages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from soppu import files
from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.compress.bundle import container
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.codec import page
from soppu.compress.codec.basis import Bases
from soppu.compress.codec.page import Page, page_shapes
from soppu.compress.numbers.components import Components
from soppu.errors import BundleError

Matrices = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Bundle:
    """The compressed adapters of n users of one base model."""

    users: tuple[str, ...]  # names, in the order of every n-sized tensor
    adapter_ids: tuple[str, ...]  # what each user's components were made from
    base_model: str  # hub id or folder
    base_hash: str  # of the base model's files, "" if unknown
    fan_in_fan_out: bool  # True where the base stores weights as (i, o)
    shapes: Mapping[str, tuple[int, int]]  # full-model module name -> (o, i), in order
    ranks: Tensor  # (modules, n) of every user's own adapter; 0 where a user does not have the module
    bases: Mapping[str, tuple[Bases, ...]]  # module -> output and input basis of every cluster
    cluster: Tensor  # (n,) int64 whose bases a user's coordinates refer to
    norm: Tensor  # (n,) float32 what gains are relative to: the whole adapter's norm, of a core a power of 4
    pages: tuple[Page, ...]  # all users' components as bytes, in order
    report: CompressionReport
    basis_saw: tuple[str, ...] = ()  # adapter ids of users taken out since the bases were fitted
    common: int = 0  # first columns of every basis that tell what all users share: `CoreBasis.common`
    _last: dict[int, list[Components]] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> Base:
        """The base model, as far as the bundle knows it."""
        return Base(self.base_model, self.base_hash)

    def index(self, user: str) -> int:
        """The user's place. Raises BundleError for a user the bundle does not hold."""
        try:
            return self._places[user]
        except KeyError:
            raise BundleError(f"unknown user {user!r}; the bundle holds {len(self.users)} users") from None

    def components(self, number: int) -> list[Components]:
        """The components of a page, one entry for every module; the page read last is kept.

        Raises:
            BundleError: the page is damaged, which only `load` of a file made to mislead can leave.
        """
        if number not in self._last:
            held, shapes = self.pages[number], page_shapes(self.shapes, self.bases)
            made = page.decode(held.data, shapes, users=held.users, first=held.first, source=f"page {number}")
            self._last.clear()
            self._last[number] = made
        return self._last[number]

    def of(self, user: str) -> dict[str, Components]:
        """Module -> the user's components there, for the modules the user has. O(page) once a page."""
        index = self.index(user)
        number = next(n for n, p in enumerate(self.pages) if p.first <= index < p.first + p.users)
        parts = zip(self.shapes, self.components(number), self.ranks[:, index].tolist(), strict=True)
        return {name: part.select(part.user == index) for name, part, rank in parts if rank}

    def matrices(self, name: str, cluster: int = 0) -> Matrices:
        """U (o, k) and V (i, k) float32 of a module and a cluster, None where a side has no basis."""
        return self._matrices[name][cluster]

    def reconstruct(self, user: str) -> LoraAdapter:
        """The user's adapter as the bundle keeps it, float32; modules the user does not have are left out.

        Its rank is the number of components: never above the user's own, but k where cores are stored full. A
        module whose components were all left out has one of zeros. O((o + i) k r) a module.

        Raises:
            BundleError: a user the bundle does not hold.
        """
        index = self.index(user)
        cluster = int(self.cluster[index])
        return LoraAdapter(
            {name: self._pair(name, part, index, cluster) for name, part in self.of(user).items()},
            base_model=self.base_model,
            base_hash=self.base_hash,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def _pair(self, name: str, part: Components, index: int, cluster: int) -> LoraPair:
        if not len(part):
            o, i = self.shapes[name]
            return LoraPair(A=self.norm.new_zeros((1, i)), B=self.norm.new_zeros((o, 1)))
        u, v = self.matrices(name, cluster)
        scale = part.gain * self.norm[index]
        # the scale is shared evenly, so that neither factor leaves the range of a 16-bit export
        root = scale.abs().sqrt()
        left = part.left.vectors(u) * (root * scale.sign())[:, None]
        return LoraPair(A=(part.right.vectors(v) * root[:, None]).contiguous(), B=left.mT.contiguous())

    def to_bytes(self) -> bytes:
        """The bundle file; equal bundles give equal bytes, whatever the time it took to make them."""
        return container.encode(self)

    def save(self, path: Path) -> str:
        """Write the file atomically; returns the bundle id, the SHA-256 of its bytes. Raises StorageError."""
        data = self.to_bytes()
        files.write_bytes(path, data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: Path, *, expected_hash: str = "") -> Bundle:
        """Read and check a bundle file, every page of it.

        Args:
            expected_hash: the bundle id the file must have; "" accepts any intact bundle.

        Raises:
            BundleError: no such file, not a bundle, damaged, inconsistent, or another bundle.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
        return cls.from_bytes(data, expected_hash=expected_hash, source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, expected_hash: str = "", source: str = "bundle") -> Bundle:
        """Read and check the bytes of a bundle file; `source` is named in messages. Raises BundleError."""
        if expected_hash and (found := hashlib.sha256(data).hexdigest()) != expected_hash:
            raise BundleError(f"{source}: SHA-256 is {found[:12]}, expected {expected_hash[:12]}")
        bundle = cls(**container.decode(data, source=source))
        for number in range(len(bundle.pages)):
            container.check_page(bundle, number, source=source)
        return bundle

    @cached_property
    def _places(self) -> dict[str, int]:
        return {user: place for place, user in enumerate(self.users)}

    @cached_property
    def _matrices(self) -> dict[str, tuple[Matrices, ...]]:
        return {
            name: tuple((out.matrix(), inn.matrix()) for out, inn in clusters)
            for name, clusters in self.bases.items()
        }
