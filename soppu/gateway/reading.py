"""A request's body: read within its bounds of size and time, and as JSON that means one thing only."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits

Json = dict[str, Any]
_DEEPEST = 32


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body. Refused: 415 unless it is called JSON, 413 where it is too large, 408 where it is too slow.

    Raises `starlette.requests.ClientDisconnect` where it breaks off.
    """
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json":
        raise Refused(415, "the body has to be `Content-Type: application/json`, said once")
    if "content-encoding" in request.headers:
        raise Refused(415, "a body with a `Content-Encoding` is not taken")
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told[:20]) > limits.body_bytes:
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
    except TimeoutError:
        raise Refused(408, f"the body has not come within {limits.body_s:g} s") from None
    return b"".join(chunks)


def parse(body: bytes) -> Json:
    """The body as an object. Refused: 400 where it is no JSON; 422 for a key said twice, or no object."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(422, "the body is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused(400, "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refused(422, "the body has to be an object")
    _check(value)
    return value


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the body may have {limits.body_bytes} bytes")


def _once(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        # which of the two is meant would be for each program on the way to say
        raise Refused(422, "the body says a key twice")
    return found


def _no_constant(_: str) -> NoReturn:
    raise Refused(422, "NaN and Infinity are no numbers of JSON")


def _check(value: Json) -> None:
    """Refuse what is nested deeper than any request, and texts that are no Unicode. O(size), no recursion."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not _is_unicode(one):
                raise Refused(422, "a text holds half of a surrogate pair")
        level = below
        if not level:
            return
    raise Refused(422, f"the body is nested deeper than {_DEEPEST} levels")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
