"""Volume: users' adapters in the folder, or the S3 prefix, that a LoRAX reads. Not the LoRAX itself.

    adapters/USER/HASH/       adapter_config.json, adapter_model.safetensors, and in most shared.safetensors
    basis/SHA256.safetensors  what many users share, once on the disk: shared.safetensors is a hard link to it
    bundles/BUNDLE.json       user -> adapter id; written last, and a bundle is staged from then on
    .staging/                 what is being written or deleted; of no use once its writer is gone

LoRAX knows an adapter by the text of its id, and keeps what it once read under it. So a folder is named after
its content, appears whole, and is never changed: another content is another id.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save

from soppu import files
from soppu.adapter import CONFIG_FILE, SHARED_FILE, WEIGHTS_FILE
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.lorax_export import Form
from soppu.errors import ConfigError, SoppuError, StorageError, TargetError
from soppu.targets.lorax_store import BucketStore, FolderStore

DTYPES = ("float16", "bfloat16")  # LoRAX casts to its model's dtype, and charges for the bytes on the disk
_HEX = 16  # of every id alike, since LoRAX finds the objects of an id by the beginning of their keys
_LONGEST = 255  # bytes of a folder's name
_OURS = re.compile(rf"adapters/[^/]+/[0-9a-f]{{{_HEX}}}")  # nothing else below `adapters` is ever deleted
_SAFE = "@+="  # beside letters, digits and _.-~; LoRAX puts ids into headers, and separates them by commas
_CURES = {
    errno.ENOSPC: "free space on it, or drop bundles that are not served any more",
    errno.EDQUOT: "free space on it, or drop bundles that are not served any more",
    errno.EROFS: "mount it writable where bundles are published",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
}


class Volume:
    """One volume. Any number may publish into a folder at once: they wait for each other."""

    def __init__(self, store: FolderStore | BucketStore) -> None:
        self._store = store
        self.source = store.source  # LoRAX's word for it: "local" or "s3"

    @classmethod
    def open(cls, where: str) -> Volume:
        """The volume at a path, or at an fsspec URL such as s3://bucket/prefix.

        Raises:
            TargetError: no such folder, or no fsspec backend for the URL.
        """
        try:
            system, path = fsspec.url_to_fs(where)
        except (ImportError, ValueError) as error:
            raise TargetError(f"volume {where}: {error}") from error
        if not isinstance(system, LocalFileSystem):
            return cls(BucketStore(system, path, name=where))
        store = FolderStore(path)
        if not store.root.is_dir():
            raise TargetError(
                f"volume {path}: no such folder; make it, and mount it where LoRAX reads (/data)"
            )
        return cls(store)

    def stage(
        self,
        bundle: Bundle,
        *,
        bundle_id: str,
        base_model: str,
        layers: int,
        dtype: str = "float16",
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, str]:
        """Write users' folders that are not there yet; user -> adapter id. O(bytes), one user in memory.

        Killed at any moment it can be called again, and goes on. What was killed is not staged: no id of it
        is in a manifest.

        Args:
            bundle_id: SHA-256 of the bundle's file.
            base_model: what the LoRAX was started with (`/info`, `model_id`).
            layers: decoder layers of that model.
            dtype: "float16" or "bfloat16".
            progress: called with (users done, users in all).

        Raises:
            BundleError: what no folder for LoRAX can be made of, as `lorax_export.Form` says.
            ConfigError: another dtype.
            TargetError: the volume refused; a folder that is there is damaged; or the bundle is staged with
                another base model, dtype or number of layers.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r}, allowed for LoRAX: {', '.join(DTYPES)}")
        form = Form(bundle, users=(), dtype=dtype, layers=layers, base_model=base_model)
        places = {user: self._user_path(user) for user in form.users}
        asked = {"base_model": base_model, "layers": form.layers, "dtype": dtype, "rank": form.rank}
        with self._failing(f"bundle {bundle_id[:12]} was not staged"), self._store.locked():
            known = self._adapters(bundle_id, asked)
            self._store.clear()
            ids = {}
            for done, (user, place) in enumerate(places.items(), start=1):
                old = known.get(user, "")
                ids[user] = old if old and self._is_intact(old) else self._write(form, user, place)
                if progress is not None:
                    progress(done, len(places))
            manifest = {"bundle": bundle_id, **asked, "adapters": ids}
            self._store.write(_manifest(bundle_id), json.dumps(manifest, indent=1).encode())
        return {user: self._store.prefix + path for user, path in ids.items()}

    def placements(self, bundle_id: str) -> dict[str, str]:
        """User -> adapter id, as LoRAX is asked for it. TargetError if the bundle is not staged here."""
        with self._failing(f"bundle {bundle_id[:12]} cannot be looked up"):
            found = self._read(bundle_id)
        if found is None:
            raise TargetError(
                f"volume {self._store.name}: bundle {bundle_id[:12]} is not staged here; publish it"
            )
        return {user: self._store.prefix + path for user, path in found["adapters"].items()}

    def staged(self) -> tuple[str, ...]:
        """Ids of the bundles staged here."""
        with self._failing("its bundles cannot be listed"):
            return tuple(sorted(name.removesuffix(".json") for name in self._store.names("bundles")))

    def drop(self, bundle_id: str) -> None:
        """Forget a bundle, if it is there, and delete the folders that no other staged bundle names.

        Whoever drops a bundle sees to it that nobody is answered from its folders any more.
        """
        with self._failing(f"bundle {bundle_id[:12]} was not dropped"), self._store.locked() as alone:
            found = self._read(bundle_id)
            self._store.delete(_manifest(bundle_id))
            if found is not None and alone:
                self._delete(found["adapters"].values())

    def sweep(self) -> tuple[str, ...]:
        """Delete what killed publications left, and folders that no staged bundle names; returns their ids.

        Publications under way elsewhere are waited for, but in a bucket, which has no locks: nothing is
        deleted there while one has begun within a day.

        Raises:
            TargetError: a manifest cannot be read: what it names is not known, and nothing is deleted.
        """
        with self._failing("it was not swept"), self._store.locked() as alone:
            if not alone:
                return ()
            gone = self._delete(self._store.folders())
            self._store.clear(thoroughly=True)
            return tuple(self._store.prefix + path for path in gone)

    def _write(self, form: Form, user: str, place: str) -> str:
        """Put the user's folder in its place unless it is there; the path of it."""
        content = {CONFIG_FILE: form.config.encode()}
        shared = None
        if self._store.links:
            common, own = form.split(user)
            content[WEIGHTS_FILE], shared = save(own), save(common) if common else None
        else:
            content[WEIGHTS_FILE] = save(form.tensors(user))
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        if shared is not None:
            sums[SHARED_FILE] = hashlib.sha256(shared).hexdigest()
        path = f"{place}/{address(sums)}"
        if not self._is_intact(path):
            self._store.put(path, content, {} if shared is None else {SHARED_FILE: shared})
        return path

    def _is_intact(self, path: str) -> bool:
        """Whether the folder is there, whole. TargetError if it holds something else than its name says."""
        sums = self._store.sums(path)
        if sums is None:
            return False
        if address(sums) != path.rpartition("/")[2]:
            raise TargetError(
                f"volume {self._store.name}: {path} is damaged: its files are not those it was named after;"
                f" delete that folder, publish again, and restart the LoRAX, which may have read it"
            )
        return True

    def _adapters(self, bundle_id: str, asked: Mapping[str, Any]) -> dict[str, str]:
        """User -> path of a bundle that is staged already, as it is asked for now; empty where it is not."""
        found = self._read(bundle_id)
        if found is None:
            return {}
        for name, value in asked.items():
            if found.get(name) != value:
                raise TargetError(
                    f"volume {self._store.name}: bundle {bundle_id[:12]} is staged with {name}"
                    f" {found.get(name)!r}, asked for now: {value!r}; drop it first, or use another volume"
                )
        return dict(found["adapters"])

    def _read(self, bundle_id: str) -> dict[str, Any] | None:
        """A bundle's manifest, None if there is none."""
        name = _manifest(bundle_id)
        data = self._store.read(name)
        if data is None:
            return None
        try:
            found = dict(json.loads(data))
            if not all(isinstance(path, str) for path in found["adapters"].values()):
                raise TypeError("a path is no text")
            return found
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise TargetError(
                f"volume {self._store.name}: {name} is damaged; delete it, and publish the bundle again"
            ) from error

    def _delete(self, paths: Iterable[str]) -> list[str]:
        """Delete those of the folders that no manifest names."""
        manifests = (self._read(name.removesuffix(".json")) for name in self._store.names("bundles"))
        kept = {path for one in manifests if one is not None for path in one["adapters"].values()}
        gone = [path for path in paths if path not in kept and _OURS.fullmatch(path)]
        for path in gone:
            self._store.remove(path)
        self._store.drop_unused()
        return gone

    def _user_path(self, user: str) -> str:
        name = quote(user, safe=_SAFE)
        if len(name) > _LONGEST:
            raise TargetError(
                f"user {user[:20]!r}...: too long for a folder: {len(name)} bytes, most {_LONGEST}"
            )
        return f"adapters/{name}"

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._store.errors as error:
            if isinstance(error, SoppuError) and not isinstance(error, StorageError):
                raise
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            cure = _CURES.get(getattr(cause, "errno", None) or 0, "")
            why = getattr(cause, "strerror", None) or cause
            raise TargetError(f"volume {self._store.name}: {what}: {why}{cure and '; ' + cure}") from error


def address(sums: Mapping[str, str]) -> str:
    """The name of a folder that holds files of these SHA-256 sums."""
    lines = "".join(f"{total}  {name}\n" for name, total in sorted(sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:_HEX]


def _manifest(bundle_id: str) -> str:
    if not files.is_name(bundle_id):
        raise TargetError(f"bundle id {bundle_id!r}: cannot be the name of a file")
    return f"bundles/{bundle_id}.json"
