"""The HTTP API: LoRAX's generation routes and health. Managing adapters: `soppu.serve.api.admin`.

Beyond LoRAX: what is wrong before the first token of a stream is answered with its own status, not with an
event in a 200 stream, and a malformed body with JSON. LoRAX's clients read both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from soppu.errors import RequestError
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.metrics import MeteredEngine, Metrics
from soppu.serve.api.openai.routes import OpenAiApi
from soppu.serve.api.operations import PROBE, OperationsApi, ServerInfo
from soppu.serve.api.requests import ParsedRequest, parse_request, read_json
from soppu.serve.api.responses import answer_body, error_body, on_request_error, stream_body
from soppu.serve.api.routes import ADMIN, GENERATING
from soppu.serve.api.routing import Routing, told
from soppu.serve.api.streams import SIGN_OF_LIFE, data, measures, next_event, server_sent, submit, watch
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Event, Finish, Generation, GenerationRequest, TokenEvent
from soppu.serve.names import header_value
from soppu.serve.router.deciding import RequestRouter
from soppu.serve.router.figures import RouterFigures

__all__ = ["ServerInfo", "create_app"]
_PROBE_S, _PAUSE_S = 60.0, 0.2  # that who joins waits for room in the queue; between two tries


def create_app(
    engine: Engine, *, info: ServerInfo, state: ServerState, router: RequestRouter | None = None
) -> Starlette:
    """The ASGI application. It starts the engine when it starts, and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    metrics = Metrics(engine)
    if router is not None:
        router.figures = RouterFigures(metrics.registry)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        if request.url.path in GENERATING:
            metrics.refused(error)
        return await on_request_error(request, error)

    metered = cast(Engine, MeteredEngine(engine, metrics))
    front = Routing(router)
    api = GenerateApi(metered, info, front)
    openai = OpenAiApi(
        metered, model_id=info.model_id, base_hash=info.base_hash, headers=api.headers, routing=front
    )
    parts = (
        api,
        openai,
        OperationsApi(engine, info, metrics),
        AdminApi(
            lambda: state, token=info.admin_token, probe=lambda adapter_id: _answers(engine, adapter_id)
        ),
    )
    return Starlette(
        routes=[route for part in parts for route in part.routes()],
        lifespan=lifespan,
        middleware=[Middleware(CrossOrigin)],
        exception_handlers={RequestError: refused, HTTPException: _on_http_error, Exception: _on_fault},
    )


def _answers(engine: Engine, adapter_id: str) -> None:
    """Ask for one token, again while the queue is full. RequestError where none comes, or none in time.

    An adapter whose logits are not finite is a 424.
    """
    deadline = time.monotonic() + _PROBE_S
    while True:
        try:
            engine.submit(GenerationRequest(PROBE, adapter_id=adapter_id, max_new_tokens=1)).result()
        except RequestError as error:
            if error.status != HTTPStatus.TOO_MANY_REQUESTS or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


class CrossOrigin(CORSMiddleware):
    """Pages of any site may generate, as with LoRAX; none but the server's own may change what is served."""

    def __init__(self, app: ASGIApp) -> None:
        # any header: clients send a key that nobody checks, and what they are (x-stainless-*); no cookies
        super().__init__(
            app,
            allow_origins=["*"],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"].startswith(ADMIN)
        await (self.app if closed else super().__call__)(scope, receive, send)


class GenerateApi:
    """LoRAX's routes. One instance belongs to one application."""

    def __init__(self, engine: Engine, info: ServerInfo, routing: Routing) -> None:
        self._engine = engine
        self._info = info
        self._routing = routing

    def routes(self) -> list[Route]:
        """The route table."""
        return [
            Route("/", self.compat, methods=["POST"]),
            Route("/invocations", self.compat, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/generate_stream", self.generate_stream, methods=["POST"]),
        ]

    async def compat(self, request: Request) -> Response:
        """`POST /`: the body's `stream` decides; the plain answer is a list of one."""
        parsed = parse_request(await read_json(request))
        if parsed.stream:
            return await self._stream(parsed)
        return await self._answer(request, parsed, wrap=True)

    async def generate(self, request: Request) -> Response:
        """`POST /generate`: the whole answer as one object."""
        return await self._answer(request, parse_request(await read_json(request), stream=False), wrap=False)

    async def generate_stream(self, request: Request) -> Response:
        """`POST /generate_stream`: server-sent events, one for each token."""
        return await self._stream(parse_request(await read_json(request), stream=True))

    async def _answer(self, request: Request, parsed: ParsedRequest, *, wrap: bool) -> Response:
        parsed, generation, events = await self._submit(parsed)
        watcher = asyncio.ensure_future(watch(request, events.put_nowait))
        try:
            tokens, finish = await _collect(events)
        finally:
            watcher.cancel()
            generation.cancel()
        body = answer_body(parsed, tokens, finish)
        headers = {**self.headers(parsed, generation), **measures(finish)}
        return JSONResponse([body] if wrap else body, headers=headers)

    async def _stream(self, parsed: ParsedRequest) -> Response:
        parsed, generation, events = await self._submit(parsed)
        return server_sent(_events(parsed, generation, events), self.headers(parsed, generation))

    async def _submit(self, parsed: ParsedRequest) -> tuple[ParsedRequest, Generation, asyncio.Queue[Event]]:
        """Queue the request, as the router has it; its events come into the queue."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        parsed = await self._routing.route(parsed)
        return parsed, await submit(self._engine, parsed, events.put_nowait), events

    def headers(self, parsed: ParsedRequest, generation: Generation) -> dict[str, str]:
        resolved = generation.job.resolved
        headers = {
            "x-model-id": header_value(self._info.model_id),
            "x-compute-type": "cpu" if self._info.device == "cpu" else "gpu",
            "x-compute-characters": str(len(parsed.generation.inputs)),
        }
        if resolved.adapter_id:
            headers["x-adapter-id"] = header_value(resolved.adapter_id)
            headers["x-adapter-source"] = parsed.parameters.adapter_source or "local"
            headers["x-adapter-version"] = resolved.version
        return headers | told(parsed)


async def _collect(events: asyncio.Queue[Event]) -> tuple[list[TokenEvent], Finish]:
    tokens: list[TokenEvent] = []
    while True:
        event = await events.get()
        if isinstance(event, RequestError):
            raise event
        tokens.append(event)
        if event.finish is not None:
            return tokens, event.finish


async def _events(
    parsed: ParsedRequest, generation: Generation, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """`data: {json}` for each token, a comment while nothing comes; an error is one event, and the last."""
    try:
        while True:
            if (event := await next_event(events)) is None:
                yield SIGN_OF_LIFE
                continue
            body = error_body(event) if isinstance(event, RequestError) else stream_body(parsed, event)
            yield data(body)
            if isinstance(event, RequestError) or event.finish is not None:
                return
    finally:
        generation.cancel()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return _plain_error(request, error.status_code, error.detail, headers=error.headers)
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    methods = sorted({"OPTIONS"}.union(*(route.methods for route in routes)))
    allowed = {"allow": ", ".join(methods)}  # of all routes of this path; starlette knows the first one's
    if request.method == "OPTIONS":
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=allowed)
    return _plain_error(request, error.status_code, error.detail, headers=allowed)


async def _on_fault(request: Request, _: Exception) -> Response:
    """What no handler foresaw: logged with its traceback, and answered as every other error is."""
    # CrossOrigin is passed by here
    open_ = {} if request.url.path.startswith(ADMIN) else {"access-control-allow-origin": "*"}
    return _plain_error(
        request, 500, "the server has failed at this request; its log says where", headers=open_
    )


def _plain_error(
    request: Request, status: int, why: str, *, headers: Mapping[str, str] | None = None
) -> Response:
    body = {
        "error": f"{request.method} {request.url.path}: {why}",
        "error_type": HTTPStatus(status).name.lower(),
    }
    return JSONResponse(body, status_code=status, headers=headers)
