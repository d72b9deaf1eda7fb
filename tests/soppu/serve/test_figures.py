"""The figures of a server: LoRAX's names, counted by adapter, as text and as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from soppu.errors import RequestError
from soppu.serve.api import metrics
from soppu.serve.api.metrics import Metrics
from soppu.serve.engine.generation import Finish, GenerationRequest
from tests.soppu.serve import tiny
from tests.soppu.serve.operated import PROMPT, USERS, Server, operated


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with operated(tmp_path_factory.mktemp("server")) as server:
        yield server


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
