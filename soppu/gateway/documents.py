"""The gateway's routes as an OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from soppu import __version__
from soppu.gateway.bodies import ChatBody, CompletionBody, LoraxBody

_REFERENCE = "#/components/schemas/{model}"
_BODIES: dict[str, type[BaseModel]] = {
    "/": LoraxBody,
    "/generate": LoraxBody,
    "/generate_stream": LoraxBody,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}
_READ = {
    "/health": "Whether it takes requests",
    "/info": "The server of the caller's model",
    "/v1/models": "The caller's model",
    "/v1/models/{id}": "The caller's model, by its name",
    "/metrics": "Figures for Prometheus; an admin's key",
    "/soppu/v1/servers": "The servers behind; an admin's key",
    "/api-doc/openapi.json": "This document",
}
_REFUSED = ("400", "401", "403", "404", "408", "413", "415", "422", "429", "502", "503", "504")


def openapi() -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    bodies = list(dict.fromkeys(_BODIES.values()))
    _, held = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    paths: dict[str, Any] = {path: {"get": _described(what)} for path, what in _READ.items()}
    for name in ("/v1/models/{id}",):
        paths[name]["get"]["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    for path, body in _BODIES.items():
        schema = {"$ref": _REFERENCE.format(model=body.__name__)}
        content = {"required": True, "content": {"application/json": {"schema": schema}}}
        what = "Generate with the caller's model; `model` and `adapter_id` may name it, or be absent"
        paths.setdefault(path, {})["post"] = {**_described(what), "requestBody": content}
    return {
        "openapi": "3.1.0",
        "info": {"title": "SOPPU gateway", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": held["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _described(what: str) -> dict[str, Any]:
    refused = {status: {"description": "the message says why"} for status in _REFUSED}
    return {"summary": what, "responses": {"200": {"description": "as asked"}, **refused}}
