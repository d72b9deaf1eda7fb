"""Admin routes under /soppu/v1: put, activate, delete bundles and adapters. Not part of LoRAX's API."""

from __future__ import annotations

import hashlib
import hmac
import re
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import files
from soppu.adapter import CONFIG_FILE, IDENTITY_FILE, WEIGHTS_FILE
from soppu.errors import AdapterError, BundleError, RequestError, StorageError
from soppu.serve.api.requests import body_chunks, read_json
from soppu.serve.bank.holdings import Holder
from soppu.serve.names import check_name, check_servable

Handler = Callable[[Request], Awaitable[Response]]
P = ParamSpec("P")
T = TypeVar("T")
_BUNDLE_ID = re.compile(r"[0-9a-f]{64}")
_EXPECTED = (CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE)
_IGNORED = ("README.md", ".gitattributes")  # what PEFT and the hub put beside an adapter
_MAX_UPLOAD = 8 << 30


class Served(Protocol):
    """What may be changed, ours (`bank.store`) or the vLLM plugin's (`frontend.control`).

    Methods block, and raise BundleError, AdapterError or StorageError.
    """

    @property
    def bank(self) -> Holder[Any, Any]:
        """What is loaded."""

    @property
    def incoming(self) -> Path:
        """A folder for uploads under way."""

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Stage a bundle file. False if it was there."""

    def activate(self, bundle_id: str) -> str:
        """Serve plain names from this bundle, "" from none; the one that was active."""

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under a name, or replace the one of that name."""

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""


class AdminApi:
    """Routes that change what a server serves. `served` is asked at each request: routes may come first.

    Every route asks for the token; with "" every route is closed.
    """

    def __init__(self, served: Callable[[], Served], *, token: str = "") -> None:
        self._served = served
        self._token = token

    def routes(self) -> list[Route]:
        """The route table."""
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/soppu/v1/bundles", self.list_bundles),
            ("PUT", "/soppu/v1/bundles/{bundle_id}", self.put_bundle),
            ("POST", "/soppu/v1/bundles/{bundle_id}/activate", self.activate),
            ("DELETE", "/soppu/v1/bundles/{bundle_id}", self.delete_bundle),
            ("POST", "/soppu/v1/deactivate", self.deactivate),
            ("GET", "/soppu/v1/users/{user:path}", self.show_user),
            ("GET", "/soppu/v1/adapters", self.list_adapters),
            ("PUT", "/soppu/v1/adapters/{name:path}", self.put_adapter),
            ("DELETE", "/soppu/v1/adapters/{name:path}", self.delete_adapter),
        ]
        return [Route(path, self._guarded(handler), methods=[method]) for method, path, handler in table]

    async def list_bundles(self, _: Request) -> Response:
        """Every loaded bundle with its users; which one is active."""
        bank = self._served().bank
        active = bank.active

        def listed() -> Response:  # off the event loop: there may be a million users
            bundles = [
                {"bundle_id": bundle_id, "active": bundle_id == active, "users": list(users)}
                for bundle_id, users in bank.bundles().items()
            ]
            return JSONResponse({"active": active, "bundles": bundles})

        return await run_in_threadpool(listed)

    async def put_bundle(self, request: Request) -> Response:
        """Store and stage a bundle; the body is the file. 201 new, 200 already there, 422 another content."""
        bundle_id = _bundle_id(request)
        async with self._upload(request) as (path, digest):
            if digest != bundle_id:
                raise _invalid(f"the body has SHA-256 {digest}, the bundle id says {bundle_id}")
            new = await _call(self._served().add_bundle, path, bundle_id=bundle_id)
        return JSONResponse({"bundle_id": bundle_id, "new": new}, status_code=201 if new else 200)

    async def activate(self, request: Request) -> Response:
        """Serve plain user names from this bundle from now on."""
        bundle_id = self._loaded(request)
        previous = await _call(self._served().activate, bundle_id)
        return JSONResponse({"active": bundle_id, "previous": previous})

    async def deactivate(self, _: Request) -> Response:
        """Serve plain user names from no bundle."""
        previous = await _call(self._served().activate, "")
        return JSONResponse({"active": "", "previous": previous})

    async def delete_bundle(self, request: Request) -> Response:
        """Forget a bundle and its file. 409 while it is active."""
        bundle_id = self._loaded(request)
        if bundle_id == self._served().bank.active:
            raise RequestError(
                f"bundle {bundle_id} is active; activate another one first", status=409, error_type="conflict"
            )
        await _call(self._served().drop_bundle, bundle_id)
        return JSONResponse({"deleted": bundle_id})

    async def show_user(self, request: Request) -> Response:
        """What is answered for a user now, and the versions to ask for. 404 for somebody unknown."""
        user, bank = request.path_params["user"], self._served().bank
        check_name(user, what="user")
        answer = bank.answers(user)
        if answer is None:
            raise _not_found(f"no loaded bundle or adapter has {user!r}")
        return JSONResponse({"user": user, "active_bundle": bank.active, **asdict(answer)})

    async def list_adapters(self, _: Request) -> Response:
        """Every loaded PEFT adapter. `base_verified` says whether it states this server's base hash."""
        adapters = [
            {
                "name": name,
                "content_hash": loaded.content_hash,
                "rank": loaded.rank,
                "base_verified": loaded.verified,
            }
            for name, loaded in self._served().bank.adapters().items()
        ]
        return JSONResponse({"adapters": adapters})

    async def put_adapter(self, request: Request) -> Response:
        """Load a PEFT adapter, or replace one; the body is an uncompressed tar of its folder."""
        name = request.path_params["name"]
        check_servable(name, self._served().bank.bundles())  # before anything is uploaded
        async with self._upload(request) as (path, _):
            folder = path.with_name("adapter")
            await _call(unpack_adapter, path, folder)
            await _call(self._served().add_adapter, name, folder)
        return JSONResponse({"name": name}, status_code=201)

    async def delete_adapter(self, request: Request) -> Response:
        """Forget a PEFT adapter and its copy."""
        name = request.path_params["name"]
        if name not in self._served().bank.adapters():
            raise _not_found(f"no adapter {name!r} is loaded")
        await _call(self._served().drop_adapter, name)
        return JSONResponse({"deleted": name})

    def _guarded(self, handler: Handler) -> Handler:
        async def endpoint(request: Request) -> Response:
            self._check_token(request)
            if "\n" in request.scope["path"]:  # which a pattern takes for no part of a name
                raise _invalid("a path holds the control character U+000A")
            _refuse_other_sites(request)
            if request.method == "POST" and _has_body(request):
                await read_json(request)
            return await handler(request)

        endpoint.__doc__ = handler.__doc__
        return endpoint

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not self._token:
            why = "the admin routes are closed: this server was started without SOPPU_ADMIN_TOKEN"
        elif not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            why = (
                "an admin token is needed, as `Authorization: Bearer TOKEN`; it is the server's"
                " SOPPU_ADMIN_TOKEN, or else in the file admin-token of its state folder"
            )
        else:
            return
        raise RequestError(why, status=401, error_type="unauthorized")

    def _loaded(self, request: Request) -> str:
        bundle_id, bundles = _bundle_id(request), self._served().bank.bundles()
        if bundle_id not in bundles:
            raise _not_found(f"bundle {bundle_id} is not loaded; there are {len(bundles)}")
        return bundle_id

    @asynccontextmanager
    async def _upload(self, request: Request) -> AsyncIterator[tuple[Path, str]]:
        """The body in a file of a temporary folder, with its SHA-256; the folder is gone afterwards."""
        digest = hashlib.sha256()
        try:
            with tempfile.TemporaryDirectory(dir=self._served().incoming) as folder:
                path = Path(folder) / "body"
                # Unbuffered: closing a buffer that a full disk refused would raise a second time.
                with path.open("wb", buffering=0) as stream:
                    async for chunk in body_chunks(request, limit=_MAX_UPLOAD):
                        digest.update(chunk)
                        await run_in_threadpool(_write_all, stream, chunk)
                yield path, digest.hexdigest()
        except OSError as error:
            why = f"the upload cannot be stored: {error}"
            raise RequestError(why, status=507, error_type="storage") from error


def unpack_adapter(archive: Path, folder: Path) -> None:
    """Take the files of a PEFT folder out of an uncompressed tar; no path of the archive is ever used.

    Raises:
        AdapterError: not a tar, a member that is not a plain file (a sparse one is not), an unexpected or
            repeated name, more bytes than an upload may have, or the configuration or the weights missing.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            chosen: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isdir() or name in _IGNORED:
                    continue
                plain = member.isreg() and not member.issparse()  # some sparse bytes may unpack to any size
                if name not in _EXPECTED or not plain or name in chosen:
                    why = f"expected one plain file each of {_EXPECTED}"
                    raise AdapterError(f"tar member {member.name!r}: {why}")
                chosen[name] = member
            if (size := sum(member.size for member in chosen.values())) > _MAX_UPLOAD:
                raise AdapterError(f"the tar holds {size} bytes, at most {_MAX_UPLOAD} are taken")
            if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in chosen]:
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


async def _call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking change off the event loop; what it refuses becomes a status."""
    try:
        return await run_in_threadpool(function, *args, **kwargs)
    except (BundleError, AdapterError) as error:
        kind = "bundle" if isinstance(error, BundleError) else "adapter"
        raise RequestError(str(error), status=422, error_type=kind) from error
    except StorageError as error:
        raise RequestError(str(error), status=507, error_type="storage") from error


def _refuse_other_sites(request: Request) -> None:
    """Refuse what a browser sends for a page of another site, which may know the token from elsewhere."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        why = f"a page of {origin[:80]!r} may neither see nor change what is served here"
        raise RequestError(why, status=403, error_type="forbidden")


def _has_body(request: Request) -> bool:
    headers = request.headers
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _bundle_id(request: Request) -> str:
    bundle_id: str = request.path_params["bundle_id"]
    if not _BUNDLE_ID.fullmatch(bundle_id):
        raise _invalid(f"a bundle id is a SHA-256 in 64 hex digits. Given: {bundle_id[:80]!r}")
    return bundle_id


def _invalid(message: str) -> RequestError:
    return RequestError(message, status=422, error_type="validation")


def _not_found(message: str) -> RequestError:
    return RequestError(message, status=404, error_type="not_found")
