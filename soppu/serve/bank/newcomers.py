"""Newcomers: users who join at a server itself, each one row more of what is active.

    <folder>/<number>/core.safetensors, core.json     the core that came
    <folder>/<number>/join.json                       whose it is, and the bundles before and after

They stay there until a registry has taken them over (`soppu.stages.join_collect`), whatever is restarted.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from soppu import files
from soppu.compress import Bundle, joining
from soppu.cores import folder as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import MOST_OWN, CoreInBasis
from soppu.errors import RequestError, SoppuError, TargetError
from soppu.serve.bank.served import Served
from soppu.user_ids import ALLOWED, is_id

_FILE = "join.json"
_ROOM = 1 << 20  # bytes of an upload beside the numbers: names, headers, the archive


class Join(BaseModel, frozen=True):
    """A user who joined at the server: `before` had them added, and became `bundle_id`."""

    user: str
    core_id: str
    basis_id: str
    adapter_id: str
    before: str
    bundle_id: str
    cluster: int
    replaced: bool
    at: str  # UTC ISO
    metrics: dict[str, float]  # what the client measured


class Record(Join, strict=True, frozen=True):
    """One join as it is kept."""

    format: Literal[1] = 1
    metrics: dict[str, float] = {}


@dataclass(frozen=True)
class Asked:
    """A request to join: the folder has a core's files; `replace`: it may take the place of a row."""

    user: str
    folder: Path
    replace: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Newcomers:
    """The joins of one server, one at a time.

    Args:
        probe: asks for one token of an adapter id; RequestError where none comes. None where nobody can.
    """

    def __init__(self, served: Callable[[], Served], *, probe: Callable[[str], None] | None = None) -> None:
        self._served, self._probe = served, probe
        self._one = threading.Lock()
        self._bases: tuple[str, list[CoreBasis]] = ("", [])

    def bases(self) -> tuple[str, list[CoreBasis]]:
        """The active bundle's id, and its bases. RequestError 409: there is none; BundleError: no bases."""
        served = self._served()
        active = served.bank.active
        if not active:
            raise _conflict("no bundle is active here: there is no basis to join in")
        if self._bases[0] != active:
            self._bases = active, joining.bases_of(_bundle(served, active))
        return self._bases

    def most_bytes(self) -> int:
        """How much a core of the active bundle may take on the wire, with all that may be its own."""
        basis = self.bases()[1][0]
        inside = sum(k_out * k_in for k_out, k_in in basis.core_shapes().values())
        beside = MOST_OWN * sum(o + i for o, i in basis.module_shapes().values())
        return 4 * (inside + beside) + _ROOM

    def take(self, asked: Asked) -> tuple[Record, bool]:
        """Add a user's core to the active bundle, and serve that; what is noted, and whether it is new.

        O(bundle). The same core for the same user again changes nothing.

        Raises:
            RequestError: 422 the user's id is none; 409 no bundle is active, the core lies in none of its
                bases, the user is there and is not to be replaced, or another bundle went live meanwhile.
            AdapterError: the core is malformed, not finite, or does not fit.
            BundleError: the user has the name of an adapter, or to be replaced is the only one.
            StorageError: the disk refused it. What was served before goes on being served in all cases.
        """
        if not is_id(asked.user):
            raise RequestError(
                f"`user` {asked.user[:80]!r}, allowed: {ALLOWED}", status=422, error_type="validation"
            )
        core = cores.read(asked.folder)
        with self._one:
            active, bases = self.bases()
            cluster = _cluster(core.basis_id, bases)
            placed = CoreInBasis(core, bases[cluster], who=asked.user)
            bundle = _bundle(self._served(), active)
            there = asked.user in bundle.users
            record = Record(
                user=asked.user,
                core_id=core.id,
                basis_id=core.basis_id,
                adapter_id=core.id,
                before=active,
                bundle_id=active,
                cluster=cluster,
                replaced=there,
                at=datetime.now(UTC).isoformat(timespec="microseconds"),
                metrics=dict(asked.metrics),
            )
            if there and bundle.adapter_ids[bundle.index(asked.user)] == record.adapter_id:
                return record, False
            if there and not asked.replace:
                why = f"user {asked.user!r} is in the active bundle already; replace=true replaces them"
                raise _conflict(why)
            data = joining.put(bundle, asked.user, placed, cluster=cluster).bundle.to_bytes()
            record = record.model_copy(update={"bundle_id": hashlib.sha256(data).hexdigest()})
            return self._served_from(record, data, asked.folder), True

    def _served_from(self, record: Record, data: bytes, folder: Path) -> Record:
        """Have a join's bundle answer, note the join, and switch.

        A server that is killed between note and switch has a join that was never served: the core is sound,
        a registry takes it over as any other.
        """
        served, kept = self._served(), None
        try:
            with tempfile.TemporaryDirectory(dir=served.incoming) as temporary:
                path = Path(temporary) / "bundle.safetensors"
                files.write_bytes(path, data)
                served.add_bundle(path, bundle_id=record.bundle_id)
            if self._probe:
                self._probe(f"{record.user}@{record.bundle_id}")
            kept = self._keep(record, folder)
            served.activate(record.bundle_id, instead_of=record.before)
        except (SoppuError, OSError):
            if kept:
                shutil.rmtree(kept)
            if record.bundle_id in served.bank.bundles() and served.bank.active != record.bundle_id:
                served.drop_bundle(record.bundle_id)
            raise
        self._drop_passed(record)
        return record

    def _keep(self, record: Record, folder: Path) -> Path:
        """The folder of a join that is about to be served."""
        number = max(self.records(), default=0) + 1
        for other, one in self.records().items():
            number = other if (one.user, one.bundle_id) == (record.user, record.bundle_id) else number
        kept = self._served().newcomers / f"{number:08d}"
        for name in (cores.WEIGHTS_FILE, cores.CONFIG_FILE):
            with files.atomic_path(kept / name) as path:
                shutil.copyfile(folder / name, path)
        files.write_text(kept / _FILE, record.model_dump_json(indent=2))
        return kept

    def _drop_passed(self, record: Record) -> None:
        """Bundles of earlier joins are of no use: the one before stays, for requests that name it."""
        served, kept = self._served(), {record.bundle_id, record.before}
        for bundle_id in {one.bundle_id for one in self.records().values()} - kept:
            if bundle_id in served.bank.bundles():
                served.drop_bundle(bundle_id)

    def records(self) -> dict[int, Record]:
        """Number -> the joins that no registry has taken over yet, in order. TargetError: one is damaged."""
        found = {int(path.parent.name): _read(path) for path in self._served().newcomers.glob(f"*/{_FILE}")}
        return dict(sorted(found.items()))

    def folder(self, number: int) -> Path:
        """Where a join's core lies. RequestError 404."""
        if number not in self.records():
            raise RequestError(f"no join {number} is kept here", status=404, error_type="not_found")
        return self._served().newcomers / f"{number:08d}"

    def forget(self, number: int) -> None:
        """Let go of a join that a registry has. RequestError 404."""
        with self._one:
            shutil.rmtree(self.folder(number))


def _bundle(served: Served, bundle_id: str) -> Bundle:
    return Bundle.load(served.bundle_path(bundle_id), expected_hash=bundle_id)


def _cluster(basis_id: str, bases: list[CoreBasis]) -> int:
    for number, basis in enumerate(bases):
        if basis.id == basis_id:
            return number
    there = ", ".join(basis.id for basis in bases)
    raise _conflict(f"the core is told in basis {basis_id[:80]!r}, the active bundle has {there}: get that")


def _read(path: Path) -> Record:
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TargetError(f"{path}: not a join of format 1: {error.error_count()} faults") from None


def _conflict(message: str) -> RequestError:
    return RequestError(message, status=409, error_type="conflict")
