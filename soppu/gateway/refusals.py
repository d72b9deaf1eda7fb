"""What a caller is told who is not answered: LoRAX's error object, a status, and when to come again."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse

from soppu.errors import RequestError

_TYPES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "bad_request",
    415: "bad_request",
    422: "validation",
    429: "overloaded",
    500: "internal",
    502: "bad_gateway",
    503: "overloaded",
    504: "timeout",
}


class Refused(RequestError):
    """A request that is not answered; `after` seconds later it may be."""

    def __init__(self, status: int, why: str, *, after: float | None = None) -> None:
        super().__init__(why, status=status, error_type=_TYPES[status])
        self.after = after


def body(error: RequestError) -> dict[str, str]:
    """The error object."""
    return {"error": str(error), "error_type": error.error_type}


def answer(error: RequestError) -> JSONResponse:
    """The whole answer."""
    headers: dict[str, str] = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    after = getattr(error, "after", None)
    if after is not None or error.status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(after or 1)))
    return JSONResponse(body(error), status_code=error.status, headers=headers)
