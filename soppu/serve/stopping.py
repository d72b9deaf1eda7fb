"""A server that is told to stop: it finishes what it has begun, for a while, and answers the rest."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from soppu.serve.engine.engine import Engine

_FLUSH_SECONDS = 3  # for answers that are ready and not yet read


class DrainingServer(uvicorn.Server):
    """At SIGTERM or SIGINT it listens on and refuses new requests with 503; those under way are finished.

    What is not finished after `grace` seconds, or at a second signal, ends as `incomplete_generation`: a
    JSON error, or the last event of its stream. Then `run` returns.
    """

    def __init__(self, app: ASGIApp, engine: Engine, *, grace: float) -> None:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_FLUSH_SECONDS)
        super().__init__(config)
        self._engine = engine
        self._grace = grace
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for a signal."""
        grace, self._told = 0.0 if self._told else self._grace, True
        # in a thread: the code that a signal interrupts may hold the lock that closing waits for
        threading.Thread(target=self._drain, args=(grace,), name="soppu-drain", daemon=True).start()

    def stop(self) -> None:
        """As a signal would."""
        self.handle_exit(signal.SIGTERM, None)

    def _drain(self, grace: float) -> None:
        self._engine.close(grace=grace)
        self.should_exit = True
