"""The HTTP API: LoRAX's bodies, headers, streams and errors, health, and clients that go away."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import PreTrainedModel

from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve import tiny
from tests.soppu.serve.http_server import PROMPT, Start, put, start, three_adapters

__all__ = ["start"]


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return tiny.bundle(three_adapters())


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a stream, after checking its bytes line by line."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n")
    assert lines[-1] == "" and lines[1::2] == [""] * (len(lines) // 2)
    assert all(line.startswith("data: {") for line in lines[:-1:2])
    return [json.loads(line[6:]) for line in lines[:-1:2]]


def test_generate_answers_one_object_with_headers(start: Start, shared: Bundle) -> None:
    server = start()
    bundle_id = put(server, shared)
    response = server.post(adapter_id="alice", details=True)
    body = response.json()
    assert response.status_code == 200
    assert body["generated_text"] == tiny.peft_text(
        tiny.llama(), PROMPT, shared.reconstruct("alice"), tokens=6
    )
    details = body["details"]
    assert {
        key: details[key]
        for key in ("finish_reason", "generated_tokens", "skipped_tokens", "seed", "prefill")
    } == {
        "finish_reason": "length",
        "generated_tokens": 6,
        "skipped_tokens": 0,
        "seed": None,
        "prefill": [],
    }
    assert "".join(token["text"] for token in details["tokens"]) == body["generated_text"]
    assert all(set(token) == {"id", "text", "logprob", "special", "skipped"} for token in details["tokens"])
    assert all(isinstance(token["logprob"], float) for token in details["tokens"])
    headers = response.headers
    assert (headers["x-adapter-id"], headers["x-adapter-version"]) == ("alice", bundle_id)
    assert headers["x-model-id"] == "tiny"
    assert int(headers["x-total-tokens"]) == details["prompt_tokens"] + 6
    assert int(headers["x-total-time"]) >= int(headers["x-inference-time"]) >= 0


def test_details_only_where_asked_and_no_adapter_headers_for_the_base(start: Start) -> None:
    server = start()
    response = server.post()
    assert set(response.json()) == {"generated_text"}
    assert "x-adapter-id" not in response.headers
    assert response.json()["generated_text"] == tiny.peft_text(tiny.llama(), PROMPT, None, tokens=6)
    assert server.post(return_full_text=True).json()["generated_text"].startswith(PROMPT)


def test_the_compat_route_answers_a_list_of_one_or_a_stream(start: Start) -> None:
    server = start()
    plain = server.post("/").json()
    assert isinstance(plain, list) and len(plain) == 1
    assert server.post("/invocations").json() == plain
    streamed = events(server.post("/", stream=True))
    assert streamed[-1]["generated_text"] == plain[0]["generated_text"]


def test_a_stream_is_one_event_a_token_and_ends_without_done(start: Start, shared: Bundle) -> None:
    server = start()
    put(server, shared)
    whole = server.post(adapter_id="žofie", details=True).json()
    response = server.post("/generate_stream", adapter_id="žofie", details=True)
    found = events(response)
    assert "[DONE]" not in response.text
    assert all(set(event) == {"token", "generated_text", "details"} for event in found)
    assert [event["token"] for event in found] == whole["details"]["tokens"]
    assert [event["generated_text"] for event in found[:-1]] == [None] * 5
    assert found[-1]["generated_text"] == whole["generated_text"]
    assert set(found[-1]["details"]) == {"finish_reason", "prompt_tokens", "generated_tokens", "seed"}
    assert response.headers["x-adapter-id"] == "%C5%BEofie"
    assert response.headers["x-accel-buffering"] == "no"
    assert events(server.post("/generate_stream"))[-1]["details"] is None


def test_errors_have_loraxs_status_and_form(start: Start) -> None:
    server = start()
    for path in ("/", "/generate", "/generate_stream"):
        response = server.post(path, adapter_id="nobody")
        assert response.status_code == 424
        assert response.json()["error_type"] == "generation"
        assert response.json()["error"].startswith(
            "Request failed during generation: Server error: adapter 'nobody' is not served here"
        )
        response = server.post(path, top_p=2)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")
        assert (
            response.json()["error"] == "Input validation error: `top_p` must be > 0.0 and <= 1.0. Given: 2.0"
        )
    assert (
        server.client.post(
            "/generate", content=b"{", headers={"content-type": "application/json"}
        ).status_code
        == 400
    )
    assert server.client.post("/generate", content=b"{}").status_code == 415
    big = json.dumps({"inputs": "a" * (3 << 20)})
    response = server.client.post(
        "/generate", content=big, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.status_code == 413
    assert server.client.get("/nowhere").json()["error_type"] == "not_found"
    assert server.client.get("/generate").status_code == 405


def test_an_error_inside_a_stream_is_an_event_without_a_token(start: Start) -> None:
    server = start()
    calls = iter(range(100))

    def break_third(*_: object) -> None:
        if next(calls) == 2:
            raise ValueError("boom")

    server.model.lm_head.register_forward_hook(break_third)
    response = server.post("/generate_stream")
    found = events(response)
    assert response.status_code == 200
    assert [set(event) for event in found] == [{"token", "generated_text", "details"}] * 2 + [
        {"error", "error_type"}
    ]
    assert found[-1]["error_type"] == "generation" and "ValueError: boom" in found[-1]["error"]


def test_a_full_server_answers_429(start: Start) -> None:
    server = start(max_batch=1, max_queue=0)
    response = server.post()
    assert response.status_code == 429
    assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert response.headers["retry-after"] == "1"
    server.engine.close()
    response = server.post()
    assert (response.status_code, response.json()["error_type"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) > 0


def test_many_clients_at_once_each_get_their_own_text(start: Start, shared: Bundle) -> None:
    server = start(max_batch=4)
    put(server, shared)
    who = ["alice", "bob", "žofie", ""] * 3
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        found[index] = server.post(adapter_id=who[index]).json()["generated_text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(who))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, user in enumerate(who):
        reference = shared.reconstruct(user) if user else None
        assert found[index] == tiny.peft_text(tiny.llama(), PROMPT, reference, tokens=6)


def test_health_and_info(start: Start, shared: Bundle) -> None:
    server = start()
    bundle_id = put(server, shared)
    for path in ("/", "/health", "/ping"):
        response = server.client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    info = server.client.get("/info").json()
    assert info["server"] == "soppu"
    assert (info["model_id"], info["base_hash"], info["active_bundle"]) == ("tiny", tiny.BASE_HASH, bundle_id)
    assert (info["max_total_tokens"], info["max_input_length"], info["max_stop_sequences"]) == (128, 127, 4)
    server.engine.close()
    response = server.client.get("/health")
    assert (response.status_code, response.json()["error_type"]) == (503, "healthcheck")


def test_health_tells_of_an_engine_whose_batches_all_fail(start: Start) -> None:
    server = start()
    server.model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    for status in (200, 200, 503):
        assert server.post().status_code == 424
        assert server.client.get("/health").status_code == status


def slow_model(seen: list[int], hurry: threading.Event) -> PreTrainedModel:
    """A model that takes a tenth of a second a token, until it is told to hurry."""
    model = tiny.llama()

    def wait(*_: object) -> None:
        seen.append(1)
        hurry.wait(0.1)

    model.lm_head.register_forward_hook(wait)
    return model


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_frees_its_row(path: str, tmp_path: Path) -> None:
    seen: list[int] = []
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
    with tiny.served(slow_model(seen, threading.Event()), tmp_path / "state", max_batch=1) as url:
        with pytest.raises((requests.Timeout, StopIteration)):
            with requests.post(url + path, json=body, stream=True, timeout=0.3) as response:
                next(response.iter_lines())
                raise StopIteration
        body["parameters"] = {"max_new_tokens": 1}
        assert requests.post(f"{url}/generate", json=body, timeout=30).status_code == 200
    assert len(seen) < 90


def test_a_client_that_goes_away_leaves_the_batch_to_the_others(tmp_path: Path) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
    hurry = threading.Event()
    with tiny.served(slow_model([], hurry), tmp_path / "state", max_batch=4) as url:
        with requests.post(f"{url}/generate_stream", json=body, stream=True, timeout=30) as stays:
            lines = stays.iter_lines()
            next(lines)
            with requests.post(f"{url}/generate_stream", json=body, stream=True, timeout=30) as goes:
                begun = goes.iter_lines()  # held: without it requests hangs up at once
                next(begun)
                assert requests.get(f"{url}/info", timeout=30).json()["running"] == 2
            deadline = time.monotonic() + 10
            while requests.get(f"{url}/info", timeout=30).json()["running"] != 1:
                assert time.monotonic() < deadline
            hurry.set()
            assert sum(line.startswith(b"data:") for line in lines) >= 90


def test_a_silent_stream_is_kept_alive_with_comments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soppu.serve.api.streams._KEEP_ALIVE_SECONDS", 0.05)
    server = start()
    server.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.2))
    text = server.post("/generate_stream", max_new_tokens=2).text
    assert text.startswith(":\n\n") and text.count("data: ") == 2
