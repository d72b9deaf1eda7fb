"""LoRAX's parameters, every one as `PARAMETERS` says: honoured, so that it changes the answer, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.api.requests import PARAMETERS
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

PROMPT = "the quick brown fox"
BASE = {"max_new_tokens": 8, "seed": 5, "details": True}
HOT = {"do_sample": True}

# A value that changes the answer to the request beside it.
CHANGES: dict[str, tuple[object, dict[str, Any]]] = {
    "adapter_id": ("alice", {}),
    "best_of": (2, {"do_sample": True, "seed": None}),
    "temperature": (0.2, HOT),
    "repetition_penalty": (5.0, {}),
    "frequency_penalty": (2.0, {"max_new_tokens": 20}),
    "presence_penalty": (2.0, {"max_new_tokens": 20}),
    "top_k": (1, HOT),
    "top_p": (0.01, HOT),
    "typical_p": (0.01, HOT),
    "do_sample": (True, {}),
    "max_new_tokens": (3, {}),
    "return_full_text": (True, {}),
    "truncate": (2, {}),
    "details": (False, {}),
    "decoder_input_details": (True, {"details": False}),
    "return_k_alternatives": (3, {}),
    "seed": (6, {"temperature": 3.0}),
    "response_format": ({"type": "json_object", "schema": {"enum": [[1]]}}, {}),
}
OWN_TESTS = {"ignore_eos_token", "stop"}  # which need a text to end
ACCEPTED = {"adapter_source": "hub", "api_token": "hf_x"}
REFUSED: dict[str, object] = {
    "merged_adapters": {"ids": ["alice"], "weights": [1.0]},
    "watermark": True,
    "apply_chat_template": True,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    torch.set_num_threads(1)
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.add("alice", tiny.lora(model, seed=1))
    state = ServerState.open(tmp_path_factory.mktemp("state"), bank)
    engine = Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=4))
    with TestClient(create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH), state=state)) as client:
        yield client
    state.close()


def ask(client: TestClient, *, path: str = "/generate", **parameters: Any) -> Any:
    return client.post(path, json={"inputs": PROMPT, "parameters": parameters})


def test_every_parameter_of_lorax_is_on_the_list_and_each_is_tried_here() -> None:
    kinds = {name: text.split(" ")[0].rstrip(",;") for name, text in PARAMETERS.items()}
    assert set(kinds.values()) == {"honoured", "accepted", "refused"}
    tried = {"honoured": {*CHANGES, *OWN_TESTS}, "accepted": set(ACCEPTED), "refused": set(REFUSED)}
    for kind, names in tried.items():
        assert names == {name for name in kinds if kinds[name] == kind}
    assert len(PARAMETERS) == 25


@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_that_is_honoured_changes_the_answer(name: str, client: TestClient) -> None:
    value, beside = CHANGES[name]
    plain = ask(client, **{**BASE, **beside})
    again = ask(client, **{**BASE, **beside})
    changed = ask(client, **{**BASE, **beside, name: value})
    assert plain.status_code == again.status_code == changed.status_code == 200, changed.text
    if name != "best_of":  # which forbids a seed
        assert plain.json() == again.json()
    assert changed.json() != plain.json()


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_parameter_that_is_accepted_changes_nothing(name: str, client: TestClient) -> None:
    assert ask(client, **BASE, **{name: ACCEPTED[name]}).json() == ask(client, **BASE).json()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_a_parameter_that_is_refused_is_a_422_that_names_it(name: str, path: str, client: TestClient) -> None:
    response = ask(client, path=path, **{name: REFUSED[name]})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert f"`{name}` is not implemented by this server" in response.json()["error"]


def test_a_stop_sequence_and_the_end_of_text_end_the_text_where_they_are_asked_to(client: TestClient) -> None:
    eos_first = {"response_format": {"type": "json_object", "schema": {"const": 1}}, "max_new_tokens": 20}
    for ignored in (False, True):
        answer = ask(client, **BASE | eos_first, ignore_eos_token=ignored).json()
        assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("1", "eos_token")
    whole = ask(client, max_new_tokens=20).json()["generated_text"]
    stop = next(whole[i : i + 3] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 3])
    answer = ask(client, max_new_tokens=20, stop=[stop], details=True).json()
    assert answer["generated_text"] == whole[: whole.index(stop) + len(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_the_bodies_of_what_is_told_beside_the_text(client: TestClient) -> None:
    ids = tiny.tokenizer()(PROMPT)["input_ids"]
    answer = ask(client, max_new_tokens=3, decoder_input_details=True, return_k_alternatives=2).json()
    details = answer["details"]  # implied
    assert [token["id"] for token in details["prefill"]] == ids
    assert [set(token) for token in details["prefill"]] == [{"id", "text", "logprob"}] * len(ids)
    assert details["prefill"][0]["logprob"] is None and details["prefill"][1]["logprob"] < 0
    for token in details["tokens"]:
        assert token["alternative_tokens"][0]["logprob"] == token["logprob"]  # greedy
        assert [set(other) for other in token["alternative_tokens"]] == [{"id", "text", "logprob"}] * 2
    answer = ask(
        client,
        best_of=2,
        do_sample=True,
        temperature=2.0,
        max_new_tokens=4,
        details=True,
        return_full_text=True,
    ).json()
    (other,) = answer["details"]["best_of_sequences"]
    assert set(other) == {
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    }  # fmt: skip
    assert other["generated_text"].startswith(PROMPT) and len(other["tokens"]) == 4
    assert other["seed"] != answer["details"]["seed"]
    assert set(ask(client, best_of=2, do_sample=True).json()) == {"generated_text"}


def test_a_stream_tells_of_alternatives_and_refuses_what_it_cannot_tell(client: TestClient) -> None:
    lines = ask(client, path="/generate_stream", max_new_tokens=3, return_k_alternatives=2).text.split("\n")
    events = [json.loads(line[6:]) for line in lines if line]
    assert [len(event["token"]["alternative_tokens"]) for event in events] == [2, 2, 2]
    for parameters in ({"decoder_input_details": True}, {"best_of": 2, "do_sample": True}):
        response = ask(client, path="/generate_stream", **parameters)
        assert response.status_code == 422
        assert "is not supported when streaming tokens" in response.json()["error"]


def test_what_langchain_sends_by_default_is_answered(client: TestClient) -> None:
    parameters = {
        "max_new_tokens": 20, "top_k": 10, "top_p": 0.95, "typical_p": 0.95, "temperature": 0.8,
        "repetition_penalty": None, "return_full_text": False, "watermark": False, "stop": [],
        "truncate": None, "seed": None, "do_sample": False,
    }  # fmt: skip
    answer = ask(client, **parameters, details=True).json()
    assert isinstance(answer["details"]["seed"], int)  # it was sampled


def test_the_server_tells_its_limits(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info["max_best_of"] == 2
    response = ask(client, best_of=3, do_sample=True)
    assert response.status_code == 422
    assert "`best_of` must be > 0 and <= 2. Given: 3" in response.json()["error"]


def test_a_prompt_of_two_megabytes_is_refused_by_its_length(client: TestClient) -> None:
    response = client.post("/generate", json={"inputs": "a" * 2_000_000})
    assert response.status_code == 422
    assert "`inputs` must have less than 127 tokens. Given: at least " in response.json()["error"]
