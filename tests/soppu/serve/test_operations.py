"""What operates a server: start-up, tokens, pages of other sites, methods of a path, versions of a name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from soppu.serve.api import tokenizing
from tests.soppu.serve import tiny
from tests.soppu.serve.operated import ADMIN, Server, operated

SITE = {"origin": "https://app.example"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with operated(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_startup_generates_a_token_of_the_base_and_fails_with_the_engine(
    server: Server, tmp_path: Path
) -> None:
    response = server.client.get("/startup")
    assert (response.status_code, response.content) == (200, b"")
    broken = Server(tmp_path)
    with broken.client:
        broken.engine.close()
        for path in ("/startup", "/health", "/ping", "/"):
            response = broken.client.get(path)
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0, path
    broken.state.close()


@pytest.mark.parametrize("text", ["def main():\n    return 0\n", "žluťoučký 🦊 kůň", "a", ""])
def test_tokens_are_those_of_the_tokenizer_with_their_characters(server: Server, text: str) -> None:
    tokens = server.client.post("/tokenize", json={"inputs": text}).json()
    assert [token["id"] for token in tokens] == tiny.tokenizer()(text)["input_ids"]
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in tokens)
    assert not text or tokens[-1]["stop"] == len(text)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "inputs"),
        ({"inputs": 1}, "inputs"),
        ({"inputs": "\ud800"}, "inputs"),
        ({"inputs": "x" * (tokenizing.MAX_CHARACTERS + 1)}, "inputs"),
        ({"inputs": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
    ],
    ids=["absent", "number", "surrogate", "long", "flag"],
)
def test_what_cannot_be_tokenized_is_refused_by_name(server: Server, body: Any, named: str) -> None:
    headers = {"content-type": "application/json"}
    response = server.client.post("/tokenize", content=json.dumps(body), headers=headers)
    assert response.status_code in (400, 422)  # a surrogate is no JSON
    assert response.status_code == 400 or f"`{named}`" in response.json()["error"]


def test_pages_of_any_site_may_generate_and_none_may_change_anything(server: Server) -> None:
    asked = {
        **SITE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    for path in ("/generate", "/v1/chat/completions", "/"):
        allowed = server.client.options(path, headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "*"
        assert set(allowed.headers["access-control-allow-methods"].split(", ")) == {"GET", "POST"}
        assert "content-type" in allowed.headers["access-control-allow-headers"].lower()
    answer = server.client.post("/generate", json={"inputs": 1}, headers=SITE)
    assert answer.status_code == 422 and answer.headers["access-control-allow-origin"] == "*"
    assert server.client.get("/info", headers=SITE).headers["access-control-allow-origin"] == "*"
    for method, path in (("OPTIONS", "deactivate"), ("GET", "bundles"), ("POST", "deactivate")):
        closed = server.client.request(method, f"/soppu/v1/{path}", headers={**asked, **ADMIN})
        assert not [name for name in closed.headers if name.startswith("access-control")], method


@pytest.mark.parametrize(
    "asked",
    ["authorization, content-type, x-stainless-lang, x-stainless-retry-count", "x-api-key", "Authorization"],
)
def test_a_client_in_a_page_may_send_its_key_and_its_own_headers_to_what_generates(
    server: Server, asked: str
) -> None:
    preflight = SITE | {"access-control-request-method": "POST", "access-control-request-headers": asked}
    for path in (
        "/generate",
        "/generate_stream",
        "/v1/completions",
        "/v1/chat/completions",
        "/",
        "/tokenize",
    ):
        allowed = server.client.options(path, headers=preflight)
        assert allowed.status_code == 200
        named = {name.strip() for name in allowed.headers["access-control-allow-headers"].lower().split(",")}
        assert {name.strip().lower() for name in asked.split(",")} <= named
        assert "access-control-allow-credentials" not in allowed.headers
    for method, path in (("PUT", "adapters/x"), ("DELETE", "adapters/x"), ("POST", "deactivate")):
        preflight["access-control-request-method"] = method
        closed = server.client.options(f"/soppu/v1/{path}", headers=preflight)
        assert not [name for name in closed.headers if name.startswith("access-control")]


def test_a_page_may_read_the_headers_of_an_answer_and_of_a_refusal(server: Server) -> None:
    good = server.client.post("/generate", json={"inputs": "x"}, headers=SITE)
    assert good.status_code == 200 and "x-total-time" in good.headers
    bad = server.client.post("/generate", json={"inputs": ""}, headers=SITE)
    for answer in (good, bad):
        assert answer.headers["access-control-expose-headers"] == "*"
    assert (
        "access-control-expose-headers"
        not in server.client.get("/soppu/v1/bundles", headers=SITE | ADMIN).headers
    )


def test_a_page_is_told_of_a_fault_of_ours_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tokenizing, "tokenize", fault)
    client = TestClient(server.client.app, raise_server_exceptions=False)
    answer = client.post("/tokenize", json={"inputs": "x"}, headers=SITE)
    assert answer.status_code == 500 and answer.headers["access-control-allow-origin"] == "*"


def test_options_says_which_methods_a_path_has(server: Server) -> None:
    wanted = {
        "/": "GET, HEAD, OPTIONS, POST",
        "/metrics": "GET, HEAD, OPTIONS",
        "/soppu/v1/adapters/x": "DELETE, OPTIONS, PUT",
    }
    for path, methods in wanted.items():
        response = server.client.options(path)
        assert (response.status_code, response.headers["allow"]) == (204, methods)
        wrong = server.client.patch(path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, methods)
    assert server.client.options("/nowhere").status_code == 404


def test_a_fault_that_nobody_foresaw_is_json_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(server.engine, "submit", broken)
    for path in ("/generate", "/generate_stream", "/"):
        response = server.generate(path)
        assert response.status_code == 500 and response.json()["error_type"] == "internal_server_error"
        assert "a secret" not in response.text
    assert server.client.get("/startup").status_code == 500


def test_a_plain_name_says_which_version_it_is_served_by(server: Server) -> None:
    found = server.client.get("/soppu/v1/users/alice", headers=ADMIN).json()
    assert found["version"] == found["active_bundle"] == server.bundle_id
    [whole] = found["loaded"]
    assert server.generate(adapter_id=whole).headers["x-adapter-id"] == whole
    assert server.client.get("/soppu/v1/users/nobody", headers=ADMIN).status_code == 404
