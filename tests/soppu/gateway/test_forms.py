"""Bodies: every field of the two APIs by name and kind, and what is sent on of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.gateway.bodies import NOTES, ChatBody, CompletionBody, LoraxBody, Parameters, read
from soppu.gateway.directory import Place
from soppu.gateway.forms import READERS, written
from soppu.gateway.naming import check_body, is_own
from soppu.gateway.reading import parse
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits, Target
from soppu.serve.api.openai.fields import BOTH, rows
from soppu.serve.api.requests import PARAMETERS
from soppu.user_ids import to_id

URL = "http://127.0.0.1:1"


def place(kind: str = "embedded", asked_as: str = "alice", **more: Any) -> Place:
    return Place(Target(url=URL, kind=kind, **more), (URL,), asked_as, "a-1")  # type: ignore[arg-type]


def sent(route: str, body: dict[str, Any], to: Place | None = None, **limits: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(READERS[route](route, body, Limits(**limits)), to or place()))
    return found


def test_the_parameters_are_lorax_s_and_the_fields_those_that_the_server_knows() -> None:
    assert set(Parameters.model_fields) == set(PARAMETERS) - {"adapter_id"}
    for route, body in zip(BOTH, (CompletionBody, ChatBody), strict=True):
        taken = {name for name, row in rows(route).items() if row.how != "refused"}
        assert set(body.model_fields) == taken - {"model"}, route


def test_a_body_is_written_anew_with_the_catalogue_s_name() -> None:
    parameters = {
        "temperature": 0.5,
        "details": True,
        "seed": None,
        "adapter_id": "alice",
        "adapter_source": "local",
    }
    body = {"inputs": "hi é", "parameters": parameters, "stream": True}
    given = {"temperature": 0.5, "details": True}
    assert sent("/", body) == {
        "inputs": "hi é",
        "stream": True,
        "parameters": {**given, "adapter_id": "alice"},
    }
    assert sent("/generate", body) == {"inputs": "hi é", "parameters": {**given, "adapter_id": "alice"}}
    to = place("lorax", "adapters/alice/1", adapter_source="s3")
    named = {"adapter_id": "adapters/alice/1", "adapter_source": "s3"}
    assert sent("/generate", body, to)["parameters"] == {**given, **named}
    assert sent("/generate", body, place("lorax", ""))["parameters"] == given  # the base model
    assert sent("/generate", {"prompt": "hi"})["inputs"] == "hi"


def test_an_openai_body_too_and_notes_go_no_further() -> None:
    body = {
        "model": "alice",
        "prompt": ["a", "b"],
        "n": 2,
        "user": {"a": 1},
        "suffix": "",
        "logit_bias": None,
    }
    assert sent("/v1/completions", body) == {"model": "alice", "prompt": ["a", "b"], "n": 2}
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "tools": [],
    }
    notes = dict.fromkeys(NOTES, "note")
    assert sent("/v1/chat/completions", chat | notes) == {"model": "alice", "messages": chat["messages"]}
    assert sent("/v1/completions", {"prompt": "a"}, place("vllm", "", base_model="base"))["model"] == "base"
    assert sent("/v1/completions", {"prompt": "a"}, place(asked_as=""))["model"] == ""
    source = sent("/v1/completions", {"prompt": "a"}, place("lorax"))["adapter_source"]
    assert source == "local"


def test_a_schema_is_passed_on_with_its_nulls() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None, "default": None}}}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert sent("/v1/chat/completions", chat | {"response_format": asked})["response_format"] == asked
    asked = {"type": "json_object", "schema": schema}
    assert (
        sent("/generate", {"inputs": "x", "parameters": {"response_format": asked}})["parameters"][
            "response_format"
        ]
        == asked
    )


@pytest.mark.parametrize(
    ("route", "body", "to", "status"),
    [
        ("/generate", {"inputs": "hi"}, place("vllm"), 422),
        ("/v1/completions", {"prompt": "hi", "ignore_eos_token": True}, place("vllm"), 422),
        ("/v1/completions", {"prompt": "hi"}, place("vllm", ""), 503),
    ],
)
def test_what_a_server_does_not_speak_is_refused(
    route: str, body: dict[str, Any], to: Place, status: int
) -> None:
    with pytest.raises(Refused) as refused:
        sent(route, body, to)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("route", "body", "named"),
    [
        ("/generate", {"inputs": 1}, "inputs"),
        ("/generate", {"inputs": ""}, "inputs"),
        ("/generate", {}, "inputs"),
        ("/generate", {"inputs": "a", "parameters": {"top_k": 1.5}}, "parameters.top_k"),
        ("/generate", {"inputs": "a", "parameters": {"do_sample": 1}}, "parameters.do_sample"),
        ("/generate", {"inputs": "a", "parameters": {"seed": -1}}, "parameters.seed"),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 65}}, "parameters.max_new_tokens"),
        ("/generate", {"inputs": "a", "parameters": {"best_of": 9}}, "parameters.best_of"),
        ("/generate", {"inputs": "a", "parameters": {"colour": "red"}}, "parameters.colour"),
        ("/generate", {"inputs": "a", "prompt": "b"}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 5, "n": 2}, "prompts times `n`"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 65}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "a\nb", "content": "x"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [], "max_completion_tokens": 65}, ""),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not(route: str, body: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused) as refused:
        sent(route, body, new_tokens=64)
    assert refused.value.status == 422 and named in str(refused.value)


def test_a_refusal_repeats_nothing_that_was_said() -> None:
    for body in ({"inputs": ["my secret"]}, {"inputs": "a", "parameters": {"stop": "my secret"}}):
        with pytest.raises(Refused) as refused:
            read(LoraxBody, body)
        assert "secret" not in str(refused.value)


def test_with_a_budget_every_request_has_a_bound() -> None:
    assert (
        sent("/generate", {"inputs": "a"}, tokens="10/day", new_tokens=64)["parameters"]["max_new_tokens"]
        == 64
    )
    assert sent("/v1/completions", {"prompt": "a"}, tokens="10/day", new_tokens=64)["max_tokens"] == 64
    chat = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5}
    assert "max_tokens" not in sent("/v1/chat/completions", chat, tokens="10/day")
    asked = READERS["/v1/completions"](
        "/v1/completions", {"prompt": ["ab", "c"], "n": 2, "max_tokens": 5}, Limits()
    )
    assert (asked.prompt_bytes, asked.texts, asked.new_tokens, asked.most_tokens) == (3, 4, 5, 23)


@given(st.text(max_size=20), st.sampled_from(["alice", "alice%40example.com", "%C3%89ve"]))
def test_a_name_is_one_s_own_or_it_is_another_s(name: str, user: str) -> None:
    """By what the registry's own rule makes of it, and by nothing more generous."""
    try:
        own = name == user or to_id(name) == user
    except ValueError:
        own = name == user
    assert is_own(name, user) == own
    if own or not name:
        check_body({"model": name}, user)
    else:
        with pytest.raises(Refused):
            check_body({"parameters": {"adapter_id": name}}, user)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
known = st.sampled_from(
    [*Parameters.model_fields, *ChatBody.model_fields, *CompletionBody.model_fields, "model"]
)


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(READERS)), st.dictionaries(known | st.just("parameters"), json_values, max_size=6)
)
def test_whatever_is_said_is_written_for_the_caller_or_refused(route: str, body: dict[str, Any]) -> None:
    try:
        value = parse(json.dumps(body).encode())
        check_body(value, "alice")
        asked = sent(route, value)
    except Refused as refused:
        assert refused.status in (400, 403, 422)
        return
    assert asked.get("model", asked.get("parameters", {}).get("adapter_id")) == "alice"
    assert "adapter_id" not in asked and "adapter_source" not in asked
