"""The page as an ASGI application: GET only, nothing from other hosts, no script but our one file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soppu.dashboard import views
from soppu.dashboard.runs import PAGES
from soppu.dashboard.views import House
from soppu.errors import NotThere, RegistryError, SoppuError

_HERE = Path(__file__).parent
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_OF_A_RUN = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;"
    " sandbox allow-scripts"
)
View = Callable[[House, Request], str]


@dataclass(frozen=True)
class Guarded:
    """Adds the headers above to every answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in known]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self.app(scope, receive, named)


def application(house: House, *, hosts: Sequence[str] = ()) -> Starlette:
    """The application.

    Args:
        house: what is looked at.
        hosts: names that it may be asked by, beside this machine's own: a page elsewhere must not read it
            through a name that it makes point here.
    """
    routes = [
        Route("/", _answer(house, views.fleet)),
        Route("/users", _answer(house, views.users)),
        Route("/users/{user}", _answer(house, views.user)),
        Route("/adapters/{adapter}", _answer(house, views.adapter)),
        Route("/bundles/{bundle}", _answer(house, views.bundle)),
        Route("/runs", _answer(house, views.runs)),
        Route("/runs/{run}", _answer(house, views.run)),
        Route("/runs/{run}/{page}", _page(house)),
        Route("/health", _health),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    # "[" is all that is compared of an IPv6 address; no name can be made to point there
    allowed = ["127.0.0.1", "localhost", "[", *hosts]
    middleware = [Middleware(Guarded), Middleware(TrustedHostMiddleware, allowed_hosts=allowed)]
    handlers = {HTTPException: _problem(house), SoppuError: _problem(house)}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _answer(house: House, view: View) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        # the catalogue is asked in a thread: its database may be busy
        return Response(await run_in_threadpool(view, house, request), media_type="text/html")

    return endpoint


def _page(house: House) -> Callable[[Request], Awaitable[Response]]:
    """The run's own pages, with style and script of their own: nothing is let in from elsewhere."""

    async def endpoint(request: Request) -> Response:
        line = house.runs.line(request.path_params["run"])
        name = request.path_params["page"]
        gone = HTTPException(404, f"there is no {name!r} of this run")
        if line is None or name not in PAGES:
            raise gone
        try:
            body = await run_in_threadpool((line.path / name).read_bytes)
        except OSError:
            raise gone from None
        return Response(body, media_type="text/html", headers={"content-security-policy": _OF_A_RUN})

    return endpoint


async def _health(_: Request) -> Response:
    return Response("ok", media_type="text/plain")


def _problem(house: House) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handler(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 503
        status = 404 if isinstance(error, NotThere) else status
        what = error.detail if isinstance(error, HTTPException) else str(error)
        if status == 503 and isinstance(error, RegistryError):
            what = f"the registry cannot be read: {error}"
        return Response(views.problem(house, status, what), status, media_type="text/html")

    return handler
