"""Bundle: all users' adapters in one shared basis, and the one file it is kept in. Not for making one.

`soppu.compress.encoding` makes and checks the bytes, `soppu.compress.schema` what they claim; docs/format.md
describes both for readers in other languages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress import encoding, schema
from soppu.compress.metrics import CompressionReport
from soppu.compress.options import DTYPES
from soppu.compress.shared import SharedModule
from soppu.errors import BundleError

__all__ = ["Bundle", "SharedModule"]


@dataclass(frozen=True, eq=False)
class Bundle:
    """The compressed adapters of n users of one base model.

    Attributes:
        users: names, in the order of every n-sized tensor.
        adapter_ids: what each user's cores were made from, same order.
        base_model: hub id or folder of the base model.
        base_hash: hash of the base model's files, "" if unknown.
        fan_in_fan_out: True where the base stores weights as (i, o).
        modules: full-model module name -> SharedModule.
        ranks: module -> rank of every user's own adapter there; 0 where a user does not have the module.
        report: how the bundle was made, and how good it is.
    """

    users: tuple[str, ...]
    adapter_ids: tuple[str, ...]
    base_model: str
    base_hash: str
    fan_in_fan_out: bool
    modules: Mapping[str, SharedModule]
    ranks: Mapping[str, tuple[int, ...]]
    report: CompressionReport

    def index(self, user: str) -> int:
        """The user's place. Raises BundleError for a user the bundle does not hold."""
        try:
            return self.users.index(user)
        except ValueError:
            raise BundleError(f"unknown user {user!r}; the bundle holds {len(self.users)} users") from None

    def reconstruct(self, user: str) -> LoraAdapter:
        """The user's adapter as the bundle keeps it, float32; modules the user does not have are left out.

        Its rank is the user's own where cores are thin, and k where they are full. O((o + i) k r) a module.

        Raises:
            BundleError: a user the bundle does not hold.
        """
        index = self.index(user)
        pairs = {
            name: module.pair(index, self.ranks[name][index])
            for name, module in self.modules.items()
            if self.ranks[name][index]
        }
        return LoraAdapter(
            pairs,
            base_model=self.base_model,
            base_hash=self.base_hash,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def to_bytes(self) -> bytes:
        """The bundle file; equal bundles give equal bytes, whatever the time it took to make them."""
        dtype = DTYPES[self.report.dtype]
        tensors = {
            f"{name}.{part}": tensor if part == "norm" else tensor.to(dtype)
            for name, module in self.modules.items()
            for part, tensor in module.tensors().items()
        }
        return encoding.encode(self._metadata(), tensors)

    def save(self, path: Path) -> str:
        """Write the file atomically; returns the bundle id, the SHA-256 of its bytes. Raises StorageError."""
        data = self.to_bytes()
        files.write_bytes(path, data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: Path, *, expected_hash: str = "") -> Bundle:
        """Read and check a bundle file.

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
        metadata, tensors = encoding.decode(data, source=source)
        return _assemble(metadata, tensors, source)

    def _metadata(self) -> dict[str, Any]:
        report = self.report.to_dict()
        del report["seconds"]  # a clock would give equal content unequal bytes
        return {
            "users": list(self.users),
            "adapter_ids": list(self.adapter_ids),
            "base_model": self.base_model,
            "base_hash": self.base_hash,
            "fan_in_fan_out": self.fan_in_fan_out,
            "dtype": self.report.dtype,
            "modules": {
                name: {
                    "out": module.U.shape[0],
                    "in": module.V.shape[0],
                    "k": module.k,
                    "c": module.c,
                    "ranks": list(self.ranks[name]),
                }
                for name, module in self.modules.items()
            },
            "report": report,
        }


def _assemble(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Bundle:
    schema.check_metadata(metadata, source)
    schema.check_tensors(metadata, tensors, source)
    ranks = {name: tuple(entry["ranks"]) for name, entry in metadata["modules"].items()}
    return Bundle(
        users=tuple(metadata["users"]),
        adapter_ids=tuple(metadata["adapter_ids"]),
        base_model=metadata["base_model"],
        base_hash=metadata["base_hash"],
        fan_in_fan_out=metadata["fan_in_fan_out"],
        modules={name: _module(name, tensors) for name in ranks},
        ranks=ranks,
        report=_report(metadata, source),
    )


def _module(name: str, tensors: Mapping[str, Tensor]) -> SharedModule:
    u, v, p, norm = (tensors[f"{name}.{part}"].float() for part in ("U", "V", "P", "norm"))
    q = tensors.get(f"{name}.Q")
    return SharedModule(u, v, p, None if q is None else q.float(), norm)


def _report(metadata: Mapping[str, Any], source: str) -> CompressionReport:
    try:
        report = CompressionReport.from_dict(metadata["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{source}: report is malformed: {error!r}") from None
    parts = (report.k_used, report.steps, report.module_error, report.certificates)
    if report.dtype != metadata["dtype"] or any(set(part) != set(metadata["modules"]) for part in parts):
        raise BundleError(f"{source}: report and bundle differ in their modules or dtype")
    if set(report.relative_error) != set(metadata["users"]):
        raise BundleError(f"{source}: report and bundle differ in their users")
    return report
