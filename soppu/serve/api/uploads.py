"""What is uploaded: a body in a file, and the files of a folder that came as a tar."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from soppu import files
from soppu.errors import AdapterError, RequestError
from soppu.serve.api.requests import body_chunks

MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Contents:
    """Files that a tar may hold, those it has to, and what is passed over."""

    allowed: tuple[str, ...]
    needed: tuple[str, ...]
    ignored: tuple[str, ...] = ()


@asynccontextmanager
async def uploaded(
    request: Request, incoming: Path, *, limit: int = MOST_BYTES
) -> AsyncIterator[tuple[Path, str]]:
    """The body in a file of a temporary folder, with its SHA-256; the folder is gone afterwards."""
    digest = hashlib.sha256()
    try:
        with tempfile.TemporaryDirectory(dir=incoming) as folder:
            path = Path(folder) / "body"
            # Unbuffered: closing a buffer that a full disk refused would raise a second time.
            with path.open("wb", buffering=0) as stream:
                async for chunk in body_chunks(request, limit=limit):
                    digest.update(chunk)
                    await run_in_threadpool(_write_all, stream, chunk)
            yield path, digest.hexdigest()
    except OSError as error:
        why = f"the upload cannot be stored: {error}"
        raise RequestError(why, status=507, error_type="storage") from error


def unpack(archive: Path, folder: Path, contents: Contents, *, limit: int = 0) -> None:
    """Take the files of a folder out of an uncompressed tar; no path of the archive is ever used.

    Raises:
        AdapterError: not a tar, a member that is not a plain file (a sparse one is not), an unexpected or
            repeated name, more bytes than `limit` (by default an upload's), or a file that is needed missing.
    """
    limit = limit or MOST_BYTES
    try:
        with tarfile.open(archive, "r:") as tar:
            chosen: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isdir() or name in contents.ignored:
                    continue
                plain = member.isreg() and not member.issparse()  # some sparse bytes may unpack to any size
                if name not in contents.allowed or not plain or name in chosen:
                    why = f"expected one plain file each of {contents.allowed}"
                    raise AdapterError(f"tar member {member.name!r}: {why}")
                chosen[name] = member
            if (size := sum(member.size for member in chosen.values())) > limit:
                raise AdapterError(f"the tar holds {size} bytes, at most {limit} are taken")
            if missing := [name for name in contents.needed if name not in chosen]:
                raise AdapterError(f"the tar lacks {missing[0]}")
            for name, member in chosen.items():
                stream = tar.extractfile(member)
                assert stream is not None
                with files.atomic_path(folder / name) as temporary, temporary.open("wb") as out:
                    shutil.copyfileobj(stream, out)
    except tarfile.TarError as error:
        raise AdapterError(f"the body is not an uncompressed tar: {error}") from None


def _write_all(stream: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
