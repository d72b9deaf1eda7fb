"""The gateway's routes: LoRAX's and OpenAI's for users, a few for operators, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import __version__
from soppu.errors import RequestError
from soppu.gateway import documents, naming, refusals, visits
from soppu.gateway.budgets import Budgets
from soppu.gateway.callers import Caller, Callers
from soppu.gateway.directory import Directory
from soppu.gateway.figures import Figures
from soppu.gateway.forms import READERS
from soppu.gateway.keys import KeyStore
from soppu.gateway.lookups import Lookups
from soppu.gateway.outbound import Outbound
from soppu.gateway.reading import parse, read_body
from soppu.gateway.refusals import Refused
from soppu.gateway.relay import Relay, Servers
from soppu.gateway.replicas import Replicas
from soppu.gateway.settings import GatewaySettings
from soppu.gateway.signed import SignedTokens
from soppu.gateway.turns import Turns
from soppu.registry import Registry

_TOLD = (
    "model_id",
    "model_dtype",
    "model_device_type",
    "model_pipeline_tag",
    "max_best_of",
    "max_stop_sequences",
    "max_input_length",
    "max_total_tokens",
)
_CONNECT_SECONDS = 5.0


@dataclass
class Gateway:
    """The parts of one gateway. `draining` is set once it is told to stop."""

    settings: GatewaySettings
    callers: Callers
    servers: Servers
    figures: Figures
    client: httpx.AsyncClient  # for the servers' own words, not for requests
    draining: bool = False

    @classmethod
    def of(cls, registry: Registry, settings: GatewaySettings) -> Gateway:
        """A gateway to what a registry says. ConfigError: the issuer's keys are a file that holds none."""
        limits = settings.limits
        transport = Outbound(kept=limits.in_flight)
        client = httpx.AsyncClient(transport=transport, timeout=_CONNECT_SECONDS, trust_env=False)
        directory, turns, lookups = Directory(registry, settings), Turns(limits), Lookups(registry.catalogue)
        replicas = Replicas(client, directory.replicas)
        servers = Servers(transport, directory, lookups, replicas, turns, Budgets(limits), limits)
        signed = SignedTokens(settings.jwt) if settings.jwt.issuer else None
        figures = Figures(settings.metric_users, visits.named)
        figures.gauge("soppu_gateway_in_flight", "Requests at the servers", lambda: turns.in_flight)
        figures.gauge("soppu_gateway_waiting", "Requests that wait", lambda: turns.waiting)
        figures.gauge(
            "soppu_gateway_servers_healthy",
            "Servers that are",
            lambda: sum(one.healthy for one in replicas.every()),
        )
        return cls(settings, Callers(KeyStore(registry.catalogue), signed, lookups), servers, figures, client)

    def app(self) -> Starlette:
        """The ASGI application. It looks after the servers' health while it runs."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            watching = asyncio.ensure_future(self.servers.replicas.watch(every=self.settings.health_s))
            try:
                yield
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
                await self.client.aclose()
                self.servers.lookups.close()

        app = Starlette(
            routes=self._routes(),
            lifespan=lifespan,
            middleware=[Middleware(visits.Visits, figures=self.figures, log_users=self.settings.log_users)],
            exception_handlers={RequestError: _refused, HTTPException: _no_route},
        )
        app.router.redirect_slashes = False  # a redirect would go where the caller's `Host` says
        return app

    def _routes(self) -> list[Route]:
        return [
            *(Route(path, self.generate, methods=["POST"]) for path in READERS),
            *(Route(path, self.health, methods=["GET"]) for path in ("/", "/health")),
            Route("/info", self.info, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/soppu/v1/servers", self.list_servers, methods=["GET"]),
            Route("/api-doc/openapi.json", self.document, methods=["GET"]),
        ]

    async def generate(self, request: Request) -> Response:
        """Every route that generates: who asks, what for, and then on to a server."""
        visit = visits.of(request.scope)
        caller = await self._user(request)
        if self.draining:
            raise Refused(503, "this gateway is stopping and takes no new requests", after=5)
        self.servers.budgets.request(caller.user)
        with ExitStack() as held:
            held.enter_context(self.servers.turns.present(caller.user))
            try:
                raw = await read_body(request, self.settings.limits)
            except ClientDisconnect:
                visit.why = "the upload broke off"
                return Response(status_code=visits.GONE)
            body = parse(raw)
            naming.check_body(body, caller.user)
            route = visit.route
            asked = READERS[route](route, body, self.settings.limits)
            return Relay(self.servers, asked, caller.user, held=held.pop_all())

    async def health(self, request: Request) -> Response:
        """200 with an empty body while it takes requests and a server answers, or none is known; else 503."""
        visits.of(request.scope).route = "/health"
        replicas = self.servers.replicas.every()
        if self.draining or replicas and not any(one.healthy for one in replicas):
            raise Refused(503, "unhealthy")
        return Response()

    async def info(self, request: Request) -> Response:
        """What the server of the caller's model says of it, as far as it is the caller's business."""
        caller = await self._user(request)
        place = await self.servers.place(caller.user)
        for replica in self.servers.replicas.ordered(place.replicas):
            with suppress(httpx.HTTPError, ValueError):
                told = (await self.client.get(f"{replica.url}/info", timeout=_CONNECT_SECONDS)).json()
                if isinstance(told, dict):
                    said = {name: told.get(name) for name in _TOLD}
                    return JSONResponse(said | {"version": __version__, "server": "soppu-gateway"})
        raise Refused(503, "no server of your model answers now", after=2)

    async def models(self, request: Request) -> Response:
        """OpenAI's list: the caller's own, and no other's."""
        caller = await self._user(request)
        return JSONResponse({"object": "list", "data": [_model(caller)]})

    async def model(self, request: Request) -> Response:
        """One of them; 404 for any other name, whether there is such a user or not."""
        visits.of(request.scope).route = "/v1/models/{id}"
        caller = await self._user(request)
        if not naming.is_own(request.path_params["id"], caller.user):
            raise Refused(404, "there is no such model for this key")
        return JSONResponse(_model(caller))

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        if not self.settings.open_metrics:
            await self._admin(request)
        return Response(self.figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_servers(self, request: Request) -> Response:
        """The servers behind, and which of them answer."""
        await self._admin(request)
        told = [
            {"url": one.url, "healthy": one.healthy, "in_flight": one.in_flight}
            for one in self.servers.replicas.every()
        ]
        return JSONResponse({"servers": told, "waiting": self.servers.turns.waiting})

    async def document(self, request: Request) -> Response:
        """The OpenAPI document."""
        visits.of(request.scope).route = "/api-doc/openapi.json"
        return JSONResponse(documents.openapi())

    async def _user(self, request: Request) -> Caller:
        visit = visits.of(request.scope)
        if visit.route == "(other)":
            visit.route = request.url.path
        _check_framing(request)
        caller = await self.callers.user(request.headers)
        visit.user, visit.key = caller.user, caller.key
        naming.check_headers(request.headers, caller.user)
        if request.scope["query_string"]:
            raise Refused(422, "no query is taken")
        return caller

    async def _admin(self, request: Request) -> None:
        visits.of(request.scope).route = request.url.path
        caller = await self.callers.admin(request.headers)
        visits.of(request.scope).key = caller.key
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
            raise Refused(403, "a page of another site may not ask for this")


def _check_framing(request: Request) -> None:
    """Refused: 400 for a body whose end two programs could see at two places."""
    headers = request.headers
    if "transfer-encoding" in headers and "content-length" in headers:
        raise Refused(400, "`Content-Length` and `Transfer-Encoding` exclude each other")
    if len(headers.getlist("content-length")) > 1 or len(headers.getlist("transfer-encoding")) > 1:
        raise Refused(400, "the length of the body is said twice")


def _model(caller: Caller) -> dict[str, object]:
    return {"id": caller.user, "object": "model", "created": 0, "owned_by": "soppu"}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    visits.of(request.scope).why = error.error_type
    return refusals.answer(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in (404, 405) else 400
    answer = refusals.answer(Refused(status, "there is no such route" if status == 404 else error.detail))
    answer.headers.update(error.headers or {})
    return answer
