"""The HTTP API: LoRAX's generation routes and health. Managing adapters: `soppu.serve.api.admin`.

Beyond LoRAX: what is wrong before the first token of a stream is answered with its own status, not with an
event in a 200 stream, and a malformed body with JSON. LoRAX's clients read both.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from soppu import __version__
from soppu.errors import RequestError
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.requests import MAX_STOP_SEQUENCES, ParsedRequest, parse_request, read_json
from soppu.serve.api.responses import answer_body, error_body, on_request_error, stream_body
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Event, Finish, Generation, TokenEvent
from soppu.serve.names import header_value

_KEEP_ALIVE_SECONDS = 15.0


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself. `admin_token` "" leaves the admin routes open."""

    model_id: str
    base_hash: str
    dtype: str = "float32"
    device: str = "cpu"
    admin_token: str = field(default="", repr=False)


def create_app(engine: Engine, *, info: ServerInfo, state: ServerState) -> Starlette:
    """The ASGI application. It starts the engine when it starts, and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    api = GenerateApi(engine, info)
    return Starlette(
        routes=[*api.routes(), *AdminApi(lambda: state, token=info.admin_token).routes()],
        lifespan=lifespan,
        exception_handlers={RequestError: on_request_error, HTTPException: _on_http_error},
    )


class GenerateApi:
    """LoRAX's routes. One instance belongs to one application."""

    def __init__(self, engine: Engine, info: ServerInfo) -> None:
        self._engine = engine
        self._info = info

    def routes(self) -> list[Route]:
        """The route table."""
        return [
            Route("/", self.compat, methods=["POST"]),
            Route("/invocations", self.compat, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/generate_stream", self.generate_stream, methods=["POST"]),
            Route("/info", self.info, methods=["GET"]),
            *(Route(path, self.health, methods=["GET"]) for path in ("/", "/health", "/ping")),
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

    async def health(self, _: Request) -> Response:
        """200 with an empty body while the engine runs and its batches succeed, else 503."""
        if self._engine.healthy:
            return Response()
        raise RequestError("unhealthy", status=503, error_type="healthcheck")

    async def info(self, _: Request) -> Response:
        """LoRAX's fields, then this server's own."""
        options, bank = self._engine.options, self._engine.bank
        return JSONResponse(
            {
                "model_id": self._info.model_id,
                "model_sha": self._info.base_hash,
                "model_dtype": f"torch.{self._info.dtype}",
                "model_device_type": self._info.device,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": options.max_queue + options.max_batch,
                "max_best_of": 1,
                "max_stop_sequences": MAX_STOP_SEQUENCES,
                "max_input_length": self._engine.max_input_tokens,
                "max_total_tokens": self._engine.max_total_tokens,
                "waiting_served_ratio": 0.0,
                "max_batch_total_tokens": options.max_batch * self._engine.max_total_tokens,
                "max_waiting_tokens": 0,
                "validation_workers": 1,
                "eager_prefill": False,
                "version": __version__,
                "sha": None,
                "docker_label": None,
                "request_logger_url": None,
                "server": "soppu",
                "base_hash": self._info.base_hash,
                "active_bundle": bank.active,
                "bundles": len(bank.bundles()),
                "adapters": len(bank.adapters()),
                "max_batch": options.max_batch,
                "waiting": self._engine.waiting,
                "running": self._engine.running,
            }
        )

    async def _answer(self, request: Request, parsed: ParsedRequest, *, wrap: bool) -> Response:
        generation, events = await self._submit(parsed)
        watcher = asyncio.ensure_future(_watch(request, events))
        try:
            tokens, finish = await _collect(events)
        finally:
            watcher.cancel()
            generation.cancel()
        body = answer_body(parsed, tokens, finish)
        headers = {**self._headers(parsed, generation), **_measures(parsed, finish)}
        return JSONResponse([body] if wrap else body, headers=headers)

    async def _stream(self, parsed: ParsedRequest) -> Response:
        generation, events = await self._submit(parsed)
        headers = self._headers(parsed, generation) | {"x-accel-buffering": "no", "cache-control": "no-cache"}
        body = _server_sent(parsed, generation, events)
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)

    async def _submit(self, parsed: ParsedRequest) -> tuple[Generation, asyncio.Queue[Event]]:
        """Queue the request with a sink that hands every event over to this event loop."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        if reading := self._engine.bank.reading(parsed.generation.adapter_id):
            # here, so that who waits for a disk takes no thread from others
            await asyncio.shield(asyncio.wrap_future(reading))
        return await run_in_threadpool(self._engine.submit, parsed.generation, sink=sink), events

    def _headers(self, parsed: ParsedRequest, generation: Generation) -> dict[str, str]:
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
        return headers


async def _collect(events: asyncio.Queue[Event]) -> tuple[list[TokenEvent], Finish]:
    tokens: list[TokenEvent] = []
    while True:
        event = await events.get()
        if isinstance(event, RequestError):
            raise event
        tokens.append(event)
        if event.finish is not None:
            return tokens, event.finish


async def _watch(request: Request, events: asyncio.Queue[Event]) -> None:
    """End the wait for tokens when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(RequestError("the client went away", status=499, error_type="incomplete_generation"))


async def _server_sent(
    parsed: ParsedRequest, generation: Generation, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """`data: {json}` for each token, a comment while nothing comes; an error is one event, and the last."""
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield ":\n\n"
                continue
            body = error_body(event) if isinstance(event, RequestError) else stream_body(parsed, event)
            yield f"data: {json.dumps(body)}\n\n"  # ASCII: no character of a token can look like a line end
            if isinstance(event, RequestError) or event.finish is not None:
                return
    finally:
        generation.cancel()


def _measures(parsed: ParsedRequest, finish: Finish) -> dict[str, str]:
    """LoRAX's counters and times, in whole milliseconds."""
    inference = finish.total - finish.queued
    seconds = {
        "x-compute-time": finish.total,
        "x-total-time": finish.total,
        "x-queue-time": finish.queued,
        "x-inference-time": inference,
        "x-time-per-token": inference / finish.generated_tokens,
        "x-time-to-first-token": finish.first,
        "x-time-per-output-token": (finish.total - finish.first) / max(finish.generated_tokens - 1, 1),
    }
    return {name: str(round(1000 * value)) for name, value in seconds.items()} | {
        "x-prompt-tokens": str(finish.prompt_tokens),
        "x-generated-tokens": str(finish.generated_tokens),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(finish.prompt_tokens + finish.generated_tokens),
    }


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).name.lower()
    body = {"error": f"{request.method} {request.url.path}: {error.detail}", "error_type": kind}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
