"""One line of log and one count for each request, however it ends; prompts and answers are in neither."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from types import TracebackType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soppu.gateway import refusals
from soppu.gateway.figures import Figures
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Names

LOG = logging.getLogger("soppu.gateway.requests")
_FAULTS = logging.getLogger(__name__)
GONE = 499  # the caller went away before there was an answer


@dataclass
class Visit:
    """What is known of one request."""

    route: str = "(other)"
    user: str = ""
    key: str = ""
    server: str = ""
    version: str = ""
    status: int = 0
    why: str = ""  # the kind of a refusal, never its words: they may hold a caller's
    tokens: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)


def of(scope: Scope) -> Visit:
    """The visit of a request."""
    visit: Visit = scope["soppu.visit"]
    return visit


class Visits:
    """Middleware around everything: tells of each request, and answers what nobody foresaw with a 500."""

    def __init__(self, app: ASGIApp, *, figures: Figures, log_users: Names) -> None:
        self._app = app
        self._figures = figures
        self._log_users = log_users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        visit = scope["soppu.visit"] = Visit()
        unread = True

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body"))
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                if unread and _has_body(scope):  # what is left of it is not read
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            if not scope["path"].isprintable():  # "/generate\n" would be taken for "/generate"
                return await refusals.answer(Refused(404, "there is no such route"))(
                    scope, receiving, sending
                )
            await self._app(scope, receiving, sending)
        except Exception as error:
            _FAULTS.error("%s: %s", visit.route, type(error).__name__, exc_info=_without_values(error))
            if not visit.status:
                visit.why = "fault"
                await refusals.answer(
                    Refused(500, "the gateway has failed at this request; its log says where")
                )(scope, receive, sending)
        finally:
            visit.status = visit.status or GONE
            self._tell(visit)
        return None

    def _tell(self, visit: Visit) -> None:
        seconds = time.monotonic() - visit.began
        self._figures.visited(
            visit.route, visit.user, status=visit.status, seconds=seconds, tokens=visit.tokens
        )
        told = {
            "route": visit.route,
            "status": visit.status,
            "why": visit.why,
            "user": named(visit.user, self._log_users),
            "key": visit.key if self._log_users == "names" else "",
            "server": visit.server,
            "version": visit.version if self._log_users == "names" else "",
            "tokens": visit.tokens,
            "waited_ms": round(1000 * visit.waited, 1),
            "ms": round(1000 * seconds, 1),
        }
        LOG.info(json.dumps({"at": round(time.time(), 3)} | {k: v for k, v in told.items() if v != ""}))


def named(user: str, how: Names) -> str:
    """How a user is told of."""
    if how == "names" or not user:
        return user
    return hashlib.sha256(f"soppu gateway {user}".encode()).hexdigest()[:12] if how == "hashed" else ""


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names or b"content-length" in names


def _without_values(error: Exception) -> tuple[type[Exception], Exception, TracebackType | None]:
    """For the log: where it happened, and of which kind; what it says may hold a caller's words."""
    kind = type(error)
    bare = Exception(f"({kind.__name__})")
    return Exception, bare.with_traceback(error.__traceback__), error.__traceback__
