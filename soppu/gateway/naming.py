"""The rule: whatever names an adapter in a request has to name the caller's own, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.datastructures import Headers

from soppu import user_ids
from soppu.errors import DataError
from soppu.gateway.reading import Json
from soppu.gateway.refusals import Refused

_SAYING = ("model", "adapter_id", "adapter", "lora", "lora_id", "lora_name", "lora_request")
# What some program somewhere reads an adapter, or a user, out of. None is sent on.
_HEADERS = frozenset(
    (
        "x-adapter-id",
        "adapter-id",
        "x-adapter",
        "x-adapter-version",
        "x-lora",
        "x-lora-id",
        "x-lora-name",
        "x-model",
        "x-model-id",
        "x-user",
        "x-user-id",
        "x-soppu-user",
        "x-forwarded-user",
        "x-forwarded-email",
        "x-remote-user",
        "remote-user",
        "x-auth-request-user",
        "x-authenticated-user",
    )
)
_ELSEWHERE = frozenset(
    (
        "x-adapter-source",
        "adapter-source",
        "x-api-token",
        "x-original-url",
        "x-rewrite-url",
        "x-http-method-override",
    )
)


def is_own(name: str, user: str) -> bool:
    """Whether a name is this user's: the id itself, or the name it is the id of."""
    if name == user:
        return True
    try:
        return user_ids.to_id(name) == user
    except DataError:
        return False


def check_body(body: Json, user: str) -> None:
    """Refused: 403 where a body names another than the caller; 422 where what it says is no text."""
    for where, value in _said(body):
        _check(where, value, user)


def check_headers(headers: Headers, user: str) -> None:
    """Refused: 403 where a header names another than the caller; 422 where it asks for other sources."""
    for raw, value in headers.raw:
        name = raw.decode("latin-1").lower()
        if name in _HEADERS:
            _check(f"header {name}", value.decode("latin-1"), user)
        elif name in _ELSEWHERE:
            raise Refused(422, f"the header {name} is not taken")


def without_names(body: Json) -> Json:
    """The body without the names that `check_body` has looked at."""
    plain = {key: value for key, value in body.items() if key not in _SAYING}
    if isinstance(parameters := plain.get("parameters"), dict):
        plain["parameters"] = {key: value for key, value in parameters.items() if key not in _SAYING}
    return plain


def _said(body: Json) -> Iterator[tuple[str, Any]]:
    for key in _SAYING:
        if key in body:
            yield key, body[key]
    parameters = body.get("parameters")
    if isinstance(parameters, dict):
        yield from ((f"parameters.{key}", parameters[key]) for key in _SAYING if key in parameters)


def _check(where: str, value: object, user: str) -> None:
    if value is None or value == "":
        return
    if not isinstance(value, str):
        raise Refused(422, f"`{where}` has to be a text")
    if not is_own(value, user):
        raise Refused(
            403, f"`{where}` may name {user!r} or nothing: a key reaches its own user's model alone"
        )
