"""The list of a server's routes: every one is in the OpenAPI document, and answers as it says there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel
from starlette.routing import Route

from soppu.serve.api import documents
from soppu.serve.api.routes import NOT_SERVED, OPERATIONS, Operation
from tests.soppu.serve.operated import ADMIN, Server, operated


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with operated(tmp_path_factory.mktemp("server")) as server:
        yield server


def listed(operations: tuple[Operation, ...]) -> set[tuple[str, str]]:
    return {(operation.method, documents.plain(operation.path)) for operation in operations}


def test_every_route_is_in_the_document_and_nothing_else(server: Server) -> None:
    routes = [route for route in server.app.routes if isinstance(route, Route)]
    assert len(routes) == len(server.app.routes) == len(OPERATIONS)
    served = {
        (method, documents.plain(route.path))
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    document = server.client.get("/api-doc/openapi.json").json()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == served == listed(OPERATIONS)
    page = server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
    assert all(path.replace("&", "&amp;") in page.text for _, path in served)
    for path in NOT_SERVED:
        assert server.client.post(path, json={}).status_code == 404


def test_the_document_is_whole(server: Server) -> None:
    document = documents.openapi()
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"$ref": "')[1:]}
    assert references and all(name.startswith("#/components/schemas/") for name in references)
    assert {name.rsplit("/")[-1] for name in references} <= set(document["components"]["schemas"])
    for operation in OPERATIONS:
        described = document["paths"][documents.plain(operation.path)][operation.method.lower()]
        assert ("security" in described) == operation.path.startswith("/soppu/v1/")
        assert ("401" in described["responses"]) == ("security" in described)
        assert operation.what and operation.lorax and operation.ours
    assert len({o["operationId"] for methods in document["paths"].values() for o in methods.values()}) == len(
        OPERATIONS
    )


def answered(server: Server, operation: Operation) -> Any:
    path = documents.plain(operation.path).format(
        id="tiny", bundle_id=server.bundle_id, name="alice", user="alice", number=1
    )
    body = {
        "/tokenize": {"inputs": "x"},
        "/v1/completions": {"model": "alice", "prompt": "x", "max_tokens": 1},
        "/v1/chat/completions": {"model": "alice", "messages": []},
    }.get(operation.path, {"inputs": "x", "parameters": {"max_new_tokens": 2, "details": True}})
    headers = {**ADMIN, "accept": "application/json"}
    return server.client.request(
        operation.method, path, headers=headers, json=body if isinstance(operation.body, type) else None
    )


# The others change what tests use; test_http_bundles.py and test_http_adapters.py look at their answers.
ASKED = [o for o in OPERATIONS if o.method in ("GET", "POST") and not o.path.endswith("deactivate")]


@pytest.mark.parametrize("operation", ASKED, ids=lambda o: f"{o.method} {o.path}")
def test_what_is_answered_is_what_the_document_says(server: Server, operation: Operation) -> None:
    response = answered(server, operation)
    described = documents.openapi()["paths"][documents.plain(operation.path)][operation.method.lower()]
    assert str(response.status_code) in described["responses"]
    if response.status_code == 200:
        kind = next((answer for answer in operation.answers if isinstance(answer, type)), None)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind.model_validate_json(response.text)
            schema = {"$ref": f"#/components/schemas/{kind.__name__}", **documents.openapi()}
            jsonschema.validate(response.json(), schema)
        elif not operation.answers:
            assert response.content == b""
