"""A gateway with a registry of a few users, before a server that notes down all that reaches it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from soppu.gateway.app import Gateway
from soppu.gateway.keys import KeyStore
from soppu.gateway.settings import GatewaySettings
from soppu.registry import Registry
from soppu.settings import build
from tests.soppu.registries import freeze, make_adapter
from tests.soppu.serve.tiny import listening

USERS = ("alice", "bob", "Alice", "straße", "k")
Json = dict[str, Any]


@dataclass
class Recording:
    """A server that answers everything, in the forms of ours, and keeps what it was asked."""

    heard: list[tuple[str, Json, Mapping[str, str]]] = field(default_factory=list)
    left: int = 0  # callers who hung up before the end
    pause: float = 0.0  # before an answer, and between the events of a stream
    events: int = 3
    status: int = 200
    healthy: bool = True
    answers_as: str | None = None  # another adapter than was asked for

    def app(self) -> Starlette:
        async def health(_: Request) -> Response:
            return Response(status_code=200 if self.healthy else 503)

        async def info(_: Request) -> Response:
            return JSONResponse({"model_id": "tiny", "active_bundle": "secret", "max_best_of": 4})

        return Starlette(
            routes=[
                Route("/health", health),
                Route("/info", info),
                Route("/{path:path}", self.answer, methods=["POST", "GET", "PUT", "DELETE", "PATCH"]),
            ]
        )

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body() or b"{}")
        self.heard.append((request.url.path, body, dict(request.headers)))
        adapter = body.get("model") or body.get("parameters", {}).get("adapter_id") or ""
        said = adapter if self.answers_as is None else self.answers_as
        headers = {"x-adapter-id": said, "server": "secret", "x-total-tokens": "7"} if said else {}
        if body.get("stream") or request.url.path == "/generate_stream":
            return StreamingResponse(self._events(request), media_type="text/event-stream", headers=headers)
        await self._wait(request)
        text = {"generated_text": f"by {said}"}
        answer: Any = [text] if request.url.path == "/" else text
        if request.url.path.startswith("/v1"):
            answer = {"choices": [{"text": f"by {said}"}], "usage": {"total_tokens": 7}, "model": said}
        return JSONResponse(answer, status_code=self.status, headers=headers)

    async def _wait(self, request: Request) -> None:
        for _ in range(int(self.pause / 0.01)):
            if await request.is_disconnected():
                self.left += 1
                return
            await asyncio.sleep(0.01)

    async def _events(self, request: Request) -> AsyncIterator[str]:
        done = 0
        try:
            for done in range(self.events):
                yield f"data: {json.dumps({'token': {'text': f'{done} '}})}\n\n"
                await asyncio.sleep(self.pause)
            done = self.events
        finally:
            self.left += done < self.events


@dataclass
class House:
    """The gateway in this process, and keys of its callers."""

    gateway: Gateway
    registry: Registry
    upstream: Recording
    url: str
    keys: Mapping[str, str]

    def headers(self, who: str = "alice") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[who]}"}

    @contextlib.contextmanager
    def client(self) -> Iterator[TestClient]:
        with TestClient(self.gateway.app(), raise_server_exceptions=False, follow_redirects=False) as client:
            yield client


def registry_of(
    root: Path, url: str, *, users: tuple[str, ...] = USERS[:3], target: str = "embedded"
) -> Registry:
    """A registry in which these users' adapters are published at a URL."""
    registry = Registry.open(root)
    adapters = {user: registry.put_adapter(make_adapter(n), user=user) for n, user in enumerate(users)}
    bundle_id = registry.put_bundle(b"1", set_id=freeze(registry, adapters))
    registry.record_publication(target=target, url=url, bundle_id=bundle_id)
    return registry


def settings_of(**values: Any) -> GatewaySettings:
    return build(GatewaySettings, {"health_s": 0.05, **values}, source="test")


@functools.cache
def _server() -> tuple[Recording, str]:
    """One recording server on a real port, for all tests of a process."""
    upstream, held = Recording(), contextlib.ExitStack()
    url = held.enter_context(listening(upstream.app()))
    atexit.register(held.close)
    return upstream, url


@contextlib.contextmanager
def house(root: Path, *, target: str = "embedded", **values: Any) -> Iterator[House]:
    """A gateway before the recording server, which has heard nothing yet."""
    upstream, url = _server()
    upstream.__init__()  # type: ignore[misc]
    registry = registry_of(root, url, target=target)
    keys = KeyStore(registry.catalogue)
    known = {user: keys.create(user)[0] for user in ("alice", "bob", "Alice", "newcomer")}
    known["admin"] = keys.create(admin=True)[0]
    try:
        yield House(Gateway.of(registry, settings_of(**values)), registry, upstream, url, known)
    finally:
        registry.close()
