"""What operates a server: figures, start-up, tokens, pages of other sites, and the list of its routes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.routing import Route
from starlette.testclient import TestClient

from soppu.errors import RequestError
from soppu.serve.api import documents, metrics, tokenizing
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.api.metrics import Metrics
from soppu.serve.api.routes import NOT_SERVED, OPERATIONS, Operation
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import Finish, GenerationRequest
from tests.soppu.serve import tiny

PROMPT = "the quick"
USERS = ("alice", "bob", "žofie")
ADMIN = {"authorization": f"Bearer {tiny.TOKEN}"}
SITE = {"origin": "https://app.example"}


class Server:
    """A server with three users and a PEFT adapter; a client that shows what the server fails at as a 500."""

    def __init__(self, folder: Path) -> None:
        model = tiny.llama()
        self.bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
        self.state = ServerState.open(folder / "state", self.bank)
        self.engine = Engine(model, tiny.tokenizer(), self.bank, EngineOptions())
        shared = tiny.bundle({user: tiny.lora(model, seed=seed) for seed, user in enumerate(USERS, 1)})
        self.bundle_id = shared.save(folder / "bundle")
        self.state.add_bundle(folder / "bundle", bundle_id=self.bundle_id)
        self.state.activate(self.bundle_id)
        info = ServerInfo("tiny", tiny.BASE_HASH, admin_token=tiny.TOKEN)
        self.app = create_app(self.engine, info=info, state=self.state)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def generate(self, path: str = "/generate", *, inputs: Any = PROMPT, **parameters: Any) -> Any:
        body = {"inputs": inputs, "parameters": {"max_new_tokens": 3, **parameters}}
        return self.client.post(path, json=body)

    def figures(self) -> dict[tuple[str, ...], float]:
        """Name and label values -> value, as Prometheus reads them."""
        text = self.client.get("/metrics").text
        return {
            (_as_written(sample.name), *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def _as_written(name: str) -> str:
    """The parser gives every counter the ending that LoRAX's do not have."""
    return name.removesuffix("_total") if name.startswith("lorax_") else name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    with server.client:
        yield server
    server.state.close()


def test_requests_are_counted_under_loraxs_names_and_by_adapter(server: Server) -> None:
    before = server.figures()
    assert server.generate(adapter_id="alice").status_code == 200
    assert server.generate("/generate_stream", adapter_id=f"alice@{server.bundle_id[:9]}").status_code == 200
    assert server.generate(adapter_id="nobody").status_code == 424
    assert server.generate(temperature=-1).status_code == 422
    assert server.generate(inputs="x " * 300).status_code == 422
    assert server.client.post("/generate", content=b"{").status_code == 415
    completion = {"model": "bob", "prompt": PROMPT, "max_tokens": 2}
    assert server.client.post("/v1/completions", json=completion).status_code == 200
    after = server.figures()
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    assert grown[("lorax_request_count",)] == 7
    assert grown[("lorax_request_success",)] == 3
    failures = {key[1]: n for key, n in grown.items() if key[0] == "lorax_request_failure" and n}
    assert failures == {"generation": 1, "validation": 2, "bad_request": 1}
    assert grown[("soppu_adapter_requests_total", "alice", "success")] == 2
    assert grown[("soppu_adapter_tokens_total", "alice", "generated")] == 6
    assert grown[("soppu_adapter_tokens_total", "bob", "generated")] == 2
    assert grown[("soppu_adapter_request_duration_seconds_count", "alice")] == 2
    for figure in ("duration", "queue_duration", "inference_duration", "mean_time_per_token_duration"):
        assert grown[(f"lorax_request_{figure}_count",)] == 3, figure
    assert grown[("lorax_request_generated_tokens_sum",)] == 8
    assert grown[("lorax_request_input_length_count",)] == 3
    assert after[("soppu_adapter_resident", "alice")] == 1
    assert after[("soppu_adapters_resident", "user")] == 2  # who has asked
    assert after[("soppu_bundle_users", "true", server.bundle_id[:12])] == len(USERS)
    assert after[("soppu_resident_users", "in_use")] + after[("soppu_resident_users", "idle")] == 2
    assert 0 < after[("soppu_resident_bytes",)] < after[("soppu_resident_limit_bytes",)] == 1 << 30
    assert grown[("soppu_resident_reads_total", "success")] == 2
    assert grown[("soppu_resident_uses_total",)] == 3
    assert grown[("soppu_resident_evictions_total",)] == 0
    deadline = time.monotonic() + 30
    while server.figures()[("lorax_batch_current_size",)]:  # a row leaves a moment after its last token
        assert time.monotonic() < deadline
    assert server.figures()[("lorax_queue_length",)] == 0


def test_blocks_and_what_prompts_share_are_counted(server: Server) -> None:
    prompt = "the quick brown fox jumps over the lazy dog, " * 2
    before = server.figures()
    for adapter in ("", "", "žofie", "žofie"):
        server.engine.submit(GenerationRequest(prompt, adapter, max_new_tokens=3)).result()
    after = server.figures()
    grown = {key: after[key] - before[key] for key in after if key[0] == "soppu_prefix_tokens_total"}
    tokens, shared = (
        len(tiny.tokenizer()(prompt)["input_ids"]),
        grown["soppu_prefix_tokens_total", "shared", "hit"],
    )
    assert shared > 0 and shared % 16 == 0 and grown["soppu_prefix_tokens_total", "own", "hit"] == shared
    assert shared + grown["soppu_prefix_tokens_total", "shared", "miss"] == 2 * tokens  # žofie has all layers
    assert (
        after["soppu_cache_blocks", "cached"] >= 2 * shared // 16
        and after[("soppu_cache_block_bytes",)] == 2048
    )
    assert after["soppu_cache_blocks", "total"] == 32 * 128 // 16 * 2
    deadline = time.monotonic() + 30
    while server.figures()["soppu_cache_blocks", "used"]:
        assert time.monotonic() < deadline


def test_the_text_says_each_name_once_with_its_type_and_without_total(server: Server) -> None:
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    types = [line.split()[2:] for line in response.text.splitlines() if line.startswith("# TYPE")]
    assert ["lorax_request_count", "counter"] in types and ["lorax_request_duration", "histogram"] in types
    assert len({name for name, _ in types}) == len(types)
    assert "_created" not in response.text
    assert not any(name.endswith("_total") for name, _ in types if name.startswith("lorax_"))


def test_the_figures_come_as_json_where_that_is_asked_for(server: Server) -> None:
    server.generate(adapter_id="žofie")
    figures = server.client.get("/metrics", headers={"accept": "application/json"}).json()
    assert figures["lorax_request_count"]["type"] == "counter"
    [entry] = figures["lorax_request_count"]["data"]
    assert entry["key"] == "lorax_request_count" and entry["value"] >= 1
    keys = [entry["key"] for entry in figures["soppu_adapter_requests"]["data"]]
    assert 'soppu_adapter_requests_total{adapter="žofie",outcome="success"}' in keys


def test_adapters_beyond_a_number_share_one_label(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_ADAPTERS", 3)
    counting = Metrics(server.engine)
    finish = Finish("length", "", 2, 1, None, 0.0, 0.1, 0.2)
    for number in range(10):
        counting.finished(f"user{number}", finish)
    counting.finished("user0", finish)
    counting.failed("user9", RequestError("x", status=424, error_type="generation"))
    data = counting.as_json()["soppu_adapter_requests"]["data"]
    counted = {entry["key"].partition("{")[2]: entry["value"] for entry in data}
    assert counted == {
        'adapter="user0",outcome="success"}': 2,
        'adapter="user1",outcome="success"}': 1,
        'adapter="user2",outcome="success"}': 1,
        'adapter="(other)",outcome="success"}': 7,
        'adapter="(other)",outcome="failure"}': 1,
    }


def test_a_name_that_nobody_has_becomes_no_label(server: Server) -> None:
    for name in ("nobody", "alice@0000", 'x"y\\z'):
        assert server.generate(adapter_id=name).status_code == 424
    labels = {value for _, *values in server.figures() for value in values}
    assert "alice" in labels and not labels & {"nobody", "alice@0000", 'x"y\\z', ""}


def test_an_error_that_all_rows_of_a_batch_share_counts_for_each(server: Server) -> None:
    counting, error = (
        Metrics(server.engine),
        RequestError("x", status=500, error_type="incomplete_generation"),
    )
    for _ in range(3):
        counting.failed("alice", error)
    counting.refused(error)  # it reaches the client's handler too
    families = counting.as_json()
    assert families["lorax_request_failure"]["data"][0] == {
        "key": 'lorax_request_failure{err="incomplete"}',
        "value": 3.0,
    }
    assert families["lorax_request_count"]["data"][0]["value"] == 0


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


# The others change what tests use; test_http.py looks at their answers.
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


def test_a_plain_name_says_which_version_it_is_served_by(server: Server) -> None:
    found = server.client.get("/soppu/v1/users/alice", headers=ADMIN).json()
    assert found["version"] == found["active_bundle"] == server.bundle_id
    [whole] = found["loaded"]
    assert server.generate(adapter_id=whole).headers["x-adapter-id"] == whole
    assert server.client.get("/soppu/v1/users/nobody", headers=ADMIN).status_code == 404
