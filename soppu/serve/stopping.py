"""A server that is told to stop: it finishes what it has begun, for a while, and answers the rest."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from types import FrameType

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soppu.serve.api.responses import on_request_error
from soppu.serve.api.routes import ADMIN
from soppu.serve.engine.engine import Engine
from soppu.serve.refusals import stopping

_FLUSH_SECONDS = 3  # for answers that are ready and not yet read


class DrainingServer(uvicorn.Server):
    """At SIGTERM or SIGINT it listens on and refuses new requests with 503; those under way are finished.

    A text that is not finished after `grace` seconds, or at a second signal, ends as
    `incomplete_generation`: a JSON error, or the last event of its stream. Uploads and other changes under
    way have the same time, and are then answered with 503. Then `run` returns.
    """

    def __init__(self, app: ASGIApp, engine: Engine, *, grace: float) -> None:
        self._under_way = _UnderWay(app)
        config = uvicorn.Config(
            self._under_way, log_level="warning", timeout_graceful_shutdown=_FLUSH_SECONDS
        )
        super().__init__(config)
        self._engine = engine
        self._grace = grace
        self._told = False

    @property
    def gave_up(self) -> bool:
        """Whether a request was answered before its work was done, which a thread may still be at."""
        return self._under_way.gave_up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for a signal."""
        grace, self._told = 0.0 if self._told else self._grace, True
        # in a thread: the code that a signal interrupts may hold the lock that closing waits for
        threading.Thread(target=self._drain, args=(grace,), name="soppu-drain", daemon=True).start()

    def stop(self) -> None:
        """As a signal would."""
        self.handle_exit(signal.SIGTERM, None)

    def _drain(self, grace: float) -> None:
        end = time.monotonic() + grace
        begun = self._under_way.drain()
        self._engine.close(grace=grace)
        self._under_way.finish(begun, seconds=max(end - time.monotonic(), _FLUSH_SECONDS if begun else 0))
        self.should_exit = True


class _UnderWay:
    """An application whose requests are known while they are answered, so that a stop can wait for them."""

    def __init__(self, app: ASGIApp) -> None:
        self.gave_up = False
        self._app = app
        self._tasks = set[asyncio.Task[None]]()
        self._changed = threading.Condition()
        self._draining = self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; with 503 one that comes too late, or is given up before it is answered."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        with self._changed:
            refused = self._over or (self._draining and _changes(scope))
            if not refused:
                self._tasks.add(task)
        try:
            if not refused:
                return await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if not self._over:
                raise
            self.gave_up = True
        finally:
            with self._changed:
                self._tasks.discard(task)
                self._changed.notify_all()
        if not begun:
            answer = await on_request_error(Request(scope), stopping())
            answer.headers["connection"] = "close"  # the rest of a body is not read
            await answer(scope, receive, send)
        return None

    def drain(self) -> frozenset[asyncio.Task[None]]:
        """Begin no more changes; what is under way now."""
        with self._changed:
            self._draining = True
            return frozenset(self._tasks)

    def finish(self, begun: frozenset[asyncio.Task[None]], *, seconds: float) -> None:
        """Wait for them for so long, then give up all that there is, and begin nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not begun & self._tasks, timeout=seconds)
            self._over = True
            self._changed.notify_all()
            for task in self._tasks:
                task.get_loop().call_soon_threadsafe(task.cancel)


def _changes(scope: Scope) -> bool:
    return scope["path"].startswith(ADMIN) and scope["method"] not in ("GET", "HEAD")
