"""Between a connection and the engine's thread: submitting, waiting for events, and what it took."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from soppu.errors import RequestError
from soppu.serve.api.requests import ParsedRequest
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Event, Finish, Generation

T = TypeVar("T")
Put = Callable[[Event], None]
_KEEP_ALIVE_SECONDS = 15.0
SIGN_OF_LIFE = ":\n\n"  # a comment, which clients pass over


async def submit(engine: Engine, parsed: ParsedRequest, put: Put) -> Generation:
    """Queue the request; every event of it is given to `put` in this event loop. Raises RequestError."""
    loop = asyncio.get_running_loop()
    if reading := engine.bank.reading(parsed.generation.adapter_id):
        # here, so that who waits for a disk takes no thread from others
        await asyncio.shield(asyncio.wrap_future(reading))

    def sink(event: Event) -> None:
        loop.call_soon_threadsafe(put, event)

    return await run_in_threadpool(engine.submit, parsed.generation, sink=sink)


async def watch(request: Request, put: Put) -> None:
    """End the wait for tokens when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    put(RequestError("the client went away", status=499, error_type="incomplete_generation"))


def server_sent(events: AsyncIterator[str], headers: Mapping[str, str]) -> Response:
    """A response of server-sent events that nothing on the way holds back."""
    unbuffered = {**headers, "x-accel-buffering": "no", "cache-control": "no-cache"}
    return StreamingResponse(events, media_type="text/event-stream", headers=unbuffered)


def data(body: object) -> str:
    """One event."""
    return f"data: {json.dumps(body)}\n\n"  # ASCII: no character of a token can look like a line end


async def next_event(events: asyncio.Queue[T]) -> T | None:
    """The next event; None where none came for so long that the connection needs a sign of life."""
    try:
        return await asyncio.wait_for(events.get(), _KEEP_ALIVE_SECONDS)
    except TimeoutError:
        return None


def measures(finish: Finish) -> dict[str, str]:
    """LoRAX's counters and times as headers, in whole milliseconds."""
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
