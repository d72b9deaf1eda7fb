"""Admin routes under /soppu/v1: put, activate, delete bundles and adapters. Not part of LoRAX's API."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu.adapter import CONFIG_FILE, IDENTITY_FILE, WEIGHTS_FILE
from soppu.errors import RequestError
from soppu.serve.api.changes import changed
from soppu.serve.api.joins import JoinApi
from soppu.serve.api.requests import read_json
from soppu.serve.api.uploads import Contents, unpack, uploaded
from soppu.serve.bank.served import Served
from soppu.serve.names import check_name, check_servable

Handler = Callable[[Request], Awaitable[Response]]
_BUNDLE_ID = re.compile(r"[0-9a-f]{64}")
_JOIN = "/soppu/v1/join"  # the only POST whose body is no JSON
_PEFT = Contents(
    (CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE),
    (CONFIG_FILE, WEIGHTS_FILE),
    ignored=("README.md", ".gitattributes"),  # what PEFT and the hub put beside an adapter
)


class AdminApi:
    """Routes that change what a server serves. `served` is asked at each request: routes may come first.

    Every route asks for the token; with "" every route is closed.

    Args:
        probe: asks for one token of an adapter id before it is switched to, RequestError where none comes.
    """

    def __init__(
        self, served: Callable[[], Served], *, token: str = "", probe: Callable[[str], None] | None = None
    ) -> None:
        self._served = served
        self._token = token
        self._joins = JoinApi(served, probe=probe)

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
            ("GET", "/soppu/v1/basis", self._joins.basis),
            ("POST", _JOIN, self._joins.join),
            ("GET", "/soppu/v1/joined", self._joins.joined),
            ("GET", "/soppu/v1/joined/{number}", self._joins.core),
            ("DELETE", "/soppu/v1/joined/{number}", self._joins.forget),
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
        async with uploaded(request, self._served().incoming) as (path, digest):
            if digest != bundle_id:
                raise _invalid(f"the body has SHA-256 {digest}, the bundle id says {bundle_id}")
            new = await changed(self._served().add_bundle, path, bundle_id=bundle_id)
        return JSONResponse({"bundle_id": bundle_id, "new": new}, status_code=201 if new else 200)

    async def activate(self, request: Request) -> Response:
        """Serve plain user names from this bundle from now on; 409 where another than `instead_of` is."""
        bundle_id = self._loaded(request)
        instead_of = request.query_params.get("instead_of")
        previous = await changed(self._served().activate, bundle_id, instead_of=instead_of)
        return JSONResponse({"active": bundle_id, "previous": previous})

    async def deactivate(self, _: Request) -> Response:
        """Serve plain user names from no bundle."""
        previous = await changed(self._served().activate, "")
        return JSONResponse({"active": "", "previous": previous})

    async def delete_bundle(self, request: Request) -> Response:
        """Forget a bundle and its file. 409 while it is active."""
        bundle_id = self._loaded(request)
        if bundle_id == self._served().bank.active:
            raise RequestError(
                f"bundle {bundle_id} is active; activate another one first", status=409, error_type="conflict"
            )
        await changed(self._served().drop_bundle, bundle_id)
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
        async with uploaded(request, self._served().incoming) as (path, _):
            folder = path.with_name("adapter")
            await changed(unpack_adapter, path, folder)
            await changed(self._served().add_adapter, name, folder)
        return JSONResponse({"name": name}, status_code=201)

    async def delete_adapter(self, request: Request) -> Response:
        """Forget a PEFT adapter and its copy."""
        name = request.path_params["name"]
        if name not in self._served().bank.adapters():
            raise _not_found(f"no adapter {name!r} is loaded")
        await changed(self._served().drop_adapter, name)
        return JSONResponse({"deleted": name})

    def _guarded(self, handler: Handler) -> Handler:
        async def endpoint(request: Request) -> Response:
            self._check_token(request)
            if "\n" in request.scope["path"]:  # which a pattern takes for no part of a name
                raise _invalid("a path holds the control character U+000A")
            _refuse_other_sites(request)
            if request.method == "POST" and request.scope["path"] != _JOIN and _has_body(request):
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


def unpack_adapter(archive: Path, folder: Path) -> None:
    """Take the files of a PEFT folder out of an uncompressed tar. AdapterError as `uploads.unpack`."""
    unpack(archive, folder, _PEFT)


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
