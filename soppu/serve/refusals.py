"""The errors a generation request can meet, in LoRAX's words and with its status codes."""

from __future__ import annotations

from soppu.errors import RequestError


def invalid(why: str) -> RequestError:
    """422: the request itself is wrong."""
    return RequestError(f"Input validation error: {why}", status=422, error_type="validation")


def failed(why: str) -> RequestError:
    """424: the adapter cannot be had, or the generation broke."""
    return RequestError(
        f"Request failed during generation: Server error: {why}", status=424, error_type="generation"
    )


def overloaded() -> RequestError:
    """429: the queue is full."""
    return RequestError("Model is overloaded", status=429, error_type="overloaded")


def stopping() -> RequestError:
    """503: what was taken is finished, nothing new is; clients read "overloaded" as "try again"."""
    return RequestError(
        "Model is overloaded: this server is stopping and takes no new requests",
        status=503,
        error_type="overloaded",
    )


def incomplete() -> RequestError:
    """500: the server stopped before the generation was finished."""
    return RequestError("Incomplete generation", status=500, error_type="incomplete_generation")
