"""One admitted request on its way: it waits for its turn, goes to a server, and the answer comes back.

Nothing is held back of a stream. Who hangs up ends the request at the server, wherever it is by then.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote

import httpx
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from soppu.errors import RegistryError
from soppu.gateway import forms, refusals, tally, visits
from soppu.gateway.budgets import Budgets
from soppu.gateway.directory import Directory, Place
from soppu.gateway.forms import Asked
from soppu.gateway.lookups import Lookups
from soppu.gateway.refusals import Refused
from soppu.gateway.replicas import Replicas
from soppu.gateway.settings import Limits
from soppu.gateway.turns import Turns

_EVENTS = "text/event-stream"
_JSON = "application/json"
_HEADERS = {"content-type": _JSON, "accept": f"{_JSON}, {_EVENTS}", "accept-encoding": "identity"}
_CONNECT_SECONDS = 5.0
_LARGEST = 1 << 26  # of an answer that is no stream
_SENT_BACK = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "retry-after",
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-time-to-first-token",
    "x-time-per-output-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-total-tokens",
    "x-adapter-id",
    "x-adapter-version",
)
_HIDDEN = (401, 403)  # what a server has against the gateway is not the caller's doing


@dataclass(frozen=True)
class Servers:
    """What requests are sent with."""

    transport: httpx.AsyncBaseTransport  # without the client around it, half of whose cost is for others
    directory: Directory
    lookups: Lookups
    replicas: Replicas
    turns: Turns
    budgets: Budgets
    limits: Limits

    async def place(self, user: str) -> Place:
        """Where a user's requests go now. Refused: as `Directory.place`."""
        try:
            return await self.lookups.do(self.directory.place, user)
        except RegistryError:
            raise Refused(503, "the catalogue cannot be read now", after=2) from None


class Relay(Response):
    """The answer to an admitted request, as an ASGI application of its own."""

    def __init__(self, servers: Servers, asked: Asked, user: str, *, held: ExitStack) -> None:
        self._held = held  # let go of at the end
        self._servers = servers
        self._asked = asked
        self._user = user
        self._started = False
        self._used = 0
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay, until there is an answer or the caller has gone."""
        with self._held:
            await self._relay(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:

        async def sending(message: Message) -> None:
            self._started = True
            async with asyncio.timeout(self._servers.limits.stalled_s):
                await send(message)

        work = asyncio.ensure_future(self._answer(scope, receive, sending))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            hung_up = work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        if hung_up and not self._started:
            visits.of(scope).why = "the caller went away"

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit, most = visits.of(scope), self._asked.most_tokens
        try:
            self._servers.budgets.promise(self._user, most)
        except Refused as error:
            return await self._refuse(error, scope, receive, send)
        self._used = most  # until it is known, and where the caller does not wait for the whole answer
        try:
            async with self._servers.turns.turn(self._user, most):
                visit.waited = time.monotonic() - visit.began
                await self._ask(visit, send)
        except TimeoutError:
            visit.why = "the caller takes nothing"
        except Refused as error:
            self._used = self._used if self._started else 0
            await self._refuse(error, scope, receive, send)
        finally:
            self._servers.budgets.settle(self._user, promised=most, used=self._used)
            visit.tokens = self._used
        return None

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        visits.of(scope).why = error.error_type
        if not self._started:
            return await refusals.answer(error)(scope, receive, send)
        event = {"error": str(error), "error_type": "incomplete_generation"}
        with suppress(TimeoutError):
            await send(
                {"type": "http.response.body", "body": b"data: " + json.dumps(event).encode() + b"\n\n"}
            )
        return None

    async def _ask(self, visit: visits.Visit, send: Send) -> None:
        place = await self._servers.place(self._user)
        body = forms.written(self._asked, place)
        visit.version = place.version
        async with self._connected(place, body, visit) as answer:
            _check(answer, place)
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            headers = [
                (name.encode(), value.encode()) for name in _SENT_BACK if (value := answer.headers.get(name))
            ]
            start: Message = {"type": "http.response.start", "status": answer.status_code, "headers": headers}
            if kind == _EVENTS:
                await self._pass_on(answer, start, send)
            else:
                await self._hand_over(answer, start, send)

    async def _pass_on(self, answer: httpx.Response, start: Message, send: Send) -> None:
        """Each piece of a stream as it comes."""
        await send(start)
        counted = tally.Tally(self._asked.prompt_bytes // 4)
        try:
            async for chunk in answer.aiter_raw():
                counted.feed(chunk)
                self._used = counted.tokens
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError:
            raise Refused(502, "the server has broken off") from None
        await send({"type": "http.response.body", "body": b""})

    async def _hand_over(self, answer: httpx.Response, start: Message, send: Send) -> None:
        """A whole answer, once it is there."""
        chunks, size = [], 0
        try:
            async for chunk in answer.aiter_raw():
                size += len(chunk)
                if size > _LARGEST:
                    raise Refused(502, "the server's answer is too long")
                chunks.append(chunk)
        except httpx.HTTPError:
            raise Refused(502, "the server has broken off") from None
        whole = b"".join(chunks)
        used = tally.of_whole(answer.headers, whole) if answer.status_code == 200 else 0
        self._used = self._asked.prompt_bytes // 4 if used is None else used
        start["headers"].append((b"content-length", str(len(whole)).encode()))
        await send(start)
        await send({"type": "http.response.body", "body": whole})

    @asynccontextmanager
    async def _connected(
        self, place: Place, body: bytes, visit: visits.Visit
    ) -> AsyncIterator[httpx.Response]:
        """The beginning of an answer. Another server is tried only where one took no connection."""
        replicas, limits = self._servers.replicas, self._servers.limits
        waits = {"connect": _CONNECT_SECONDS, "read": limits.answer_s, "write": limits.answer_s}
        for replica in replicas.ordered(place.replicas):
            request = httpx.Request(
                "POST",
                _address(f"{replica.url}{self._asked.route}"),
                headers=_HEADERS,
                content=body,
                extensions={"timeout": waits},
            )
            visit.server = replica.url
            with replica.request():
                try:
                    answer = await self._servers.transport.handle_async_request(request)
                    answer.request = request
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    replicas.gone(replica)
                    continue
                except httpx.TimeoutException:
                    raise Refused(504, "the server of your model does not answer") from None
                except httpx.HTTPError:
                    raise Refused(502, "the server of your model has broken off") from None
                try:
                    yield answer
                finally:
                    await answer.aclose()
                return
        raise Refused(503, "no server of your model answers now", after=2)


@functools.lru_cache(1024)
def _address(url: str) -> httpx.URL:
    """Read once: that is a tenth of what a request costs."""
    return httpx.URL(url)


def _check(answer: httpx.Response, place: Place) -> None:
    """Refused: 502 for an answer that is no answer of this kind, or says that it is of another adapter."""
    if answer.status_code in _HIDDEN or not (answer.status_code == 200 or answer.status_code >= 400):
        raise Refused(502, f"the server of your model answered {answer.status_code}")
    if answer.status_code == 200 and place.target.kind != "vllm":
        said = answer.headers.get("x-adapter-id", place.asked_as)
        if unquote(said) != unquote(place.asked_as):
            raise Refused(502, "the server answered with an adapter that was not asked for")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
