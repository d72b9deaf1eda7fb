"""The OpenAPI document of `api.routes`, and the same as a page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from soppu import __version__
from soppu.serve.api import answers
from soppu.serve.api.requests import Parameters
from soppu.serve.api.routes import JSON, OPERATIONS, Operation

_REFERENCE = "#/components/schemas/{model}"
_WORDS = {
    400: "not JSON",
    401: "the admin token is needed",
    403: "asked for by a page of another site",
    404: "not there",
    409: "not as things are",
    413: "the body is too large",
    415: "the content type is not application/json",
    422: "a value is refused; the message names it",
    424: "the adapter cannot be had, or the generation failed",
    429: "too many requests wait; Retry-After says when to ask again",
    500: "the server stopped before the generation was finished",
    503: "the server is stopping, or its generations fail",
    507: "the disk refused it; nothing has changed",
}
_TITLE = "SOPPU server"
_ABOUT = "LoRAX's API, OpenAI's, and under /soppu/v1 what changes the users that are served."


def openapi(operations: Iterable[Operation] = OPERATIONS) -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    chosen = list(operations)
    paths: dict[str, Any] = {}
    for operation in chosen:
        paths.setdefault(plain(operation.path), {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": _schemas(chosen),
            "securitySchemes": {"admin": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(operations: Iterable[Operation] = OPERATIONS) -> str:
    """The routes as a table, for people."""
    rows = "".join(
        f"<tr><td><code>{o.method}</code><td><code>{escape(plain(o.path))}</code><td>{escape(o.what)}"
        f"<td>{escape(_takes(o))}<td>{'admin token' if o.admin else ''}"
        for o in operations
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_TITLE} {__version__}</title>"
        "<style>body{font:16px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;"
        "border-bottom:1px solid #ccc}</style>"
        f"<h1>{_TITLE} {__version__}</h1><p>{_ABOUT}<p>The same for programs:"
        ' <a href="/api-doc/openapi.json">/api-doc/openapi.json</a>'
        f"<table><tr><th>method<th>path<th>what<th>takes<th>needs{rows}</table></html>"
    )


def plain(path: str) -> str:
    """A path of starlette as OpenAPI writes it."""
    return path.replace(":path}", "}")


def _takes(operation: Operation) -> str:
    body = operation.body
    if body is None or isinstance(body, str):
        return body or ""
    required = {name: field.is_required() for name, field in body.model_fields.items()}
    return ", ".join(name for name in required if required[name])


def _described(operation: Operation) -> dict[str, Any]:
    succeeded = {"description": "as asked", **_content(operation.answers)}
    described: dict[str, Any] = {
        "summary": operation.what,
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{plain(operation.path)}").strip("_"),
        "responses": {
            "200": succeeded,
            **({"201": succeeded} if operation.made else {}),
            **{str(status): _refusal(status) for status in operation.refusals},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, **_content((operation.body,))}
    inside = [_parameter(name, "path") for name in re.findall(r"{(\w+)", operation.path)]
    if parameters := [*inside, *(_parameter(name, "query") for name in operation.query)]:
        described["parameters"] = parameters
    if operation.admin:
        described["security"] = [{"admin": []}]
    return described


def _parameter(name: str, where: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if name == "bundle_id":
        schema["pattern"] = "^[0-9a-f]{64}$"
    if name == "limit":
        schema = {"type": "integer", "minimum": 1}
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _refusal(status: int) -> dict[str, Any]:
    refusal = {"description": _WORDS[status], **_content((answers.Error,))}
    if status in (429, 503):
        refusal["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return refusal


def _content(kinds: tuple[type[BaseModel] | str, ...]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for kind in kinds:
        if isinstance(kind, str):
            content[kind] = {} if kind == JSON else {"schema": {"type": "string"}}
        else:
            content[JSON] = {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}
    return {"content": content} if content else {}


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    kinds: dict[type[BaseModel], None] = {answers.Error: None}
    for operation in operations:
        kinds |= {kind: None for kind in (operation.body, *operation.answers) if isinstance(kind, type)}
    _, held = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    schemas: dict[str, Any] = held["$defs"]
    parameters = schemas.get(Parameters.__name__, {}).get("properties", {})
    for name, described in parameters.items():  # that null is "not given" is no part of their types
        if _takes_null(name):
            parameters[name] = {"anyOf": [described, {"type": "null"}]}
    return schemas


def _takes_null(name: str) -> bool:
    try:
        Parameters.model_validate({name: None})
    except ValueError:
        return False
    return True
