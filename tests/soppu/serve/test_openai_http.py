"""OpenAI's routes at the level of HTTP: every field of both bodies, refusals, templates, models by pages."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from starlette.testclient import TestClient
from tokenizers.processors import TemplateProcessing

from soppu.serve.api.openai.bodies import ChatBody, CompletionBody
from soppu.serve.api.openai.fields import ANSWERS, BOTH, FIELDS, Field, rows
from tests.soppu.serve import tiny
from tests.soppu.serve.talking import BUNDLE_ID, Talker, talker

TEXT, CHAT = BOTH
REQUIRED: dict[str, dict[str, Any]] = {
    TEXT: {"model": "", "prompt": "the quick"},
    CHAT: {"model": "", "messages": [{"role": "user", "content": "the quick"}]},
}
LIMITED = {"max_tokens": 3, "temperature": 0}
# A value of each honoured field, and one that is refused: of another type, or out of its range.
VALUES: dict[str, tuple[Any, Any]] = {
    "model": ("alice", 3),
    "prompt": (["a", "b"], [[1, 2]]),
    "messages": (REQUIRED[CHAT]["messages"], [{"role": "user"}]),
    "max_tokens": (2, 0),
    "max_completion_tokens": (3, -1),
    "temperature": (0.5, -1),
    "top_p": (0.5, 0),
    "n": (2, 0),
    "best_of": (2, 0),
    "stream": (True, "yes"),
    "stream_options": ({"include_usage": True}, {"include_obfuscation": True}),
    "stop": ("x", [1]),
    "seed": (7, -1),
    "repetition_penalty": (1.2, 0),
    "top_k": (5, 0),
    "ignore_eos_token": (True, 1),
    "adapter_source": ("local", 1),
    "api_token": ("t", 1),
    "echo": (True, "no"),
    "top_logprobs": (0, 21),
    "guideline": ("be good", 1),
    "presence_penalty": (1.5, 9),
    "frequency_penalty": (-0.5, -9),
}
OF_ROUTE: dict[tuple[str, str], tuple[Any, Any]] = {
    (TEXT, "logprobs"): (0, True),
    (CHAT, "logprobs"): (True, 2),
    (CHAT, "response_format"): ({"type": "json_object"}, "json"),
}
BESIDE: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talker]:
    with talker(tmp_path_factory.mktemp("openai") / "state", max_batch=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Talker) -> Iterator[TestClient]:
    with TestClient(served.app) as client:
        yield client


def ask(client: TestClient, route: str, **fields: Any) -> Any:
    return client.post(route, json={**REQUIRED[route], **LIMITED, **fields})


def per_route(how: str) -> list[Any]:
    found = [(route, field) for field in FIELDS for route in field.routes if field.how == how]
    return [pytest.param(route, field, id=f"{route} {field.name}") for route, field in found]


def refusal(response: Any, *, kind: str = "validation") -> str:
    assert response.status_code == 422, response.text
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == kind
    return str(response.json()["error"])


@pytest.mark.parametrize(
    ("route", "params", "body"), [(TEXT, text_params, CompletionBody), (CHAT, chat_params, ChatBody)]
)
def test_the_table_has_every_field_of_the_client_and_of_ours(route: str, params: Any, body: Any) -> None:
    theirs = get_type_hints(params.CompletionCreateParamsStreaming)
    ours, table = set(body.model_fields), rows(route)
    assert set(theirs) <= set(table)
    assert {name for name, field in table.items() if field.how != "refused"} == ours
    assert len(table) == sum(route in field.routes for field in FIELDS)  # no field twice
    assert all(field.description for field in body.model_fields.values())
    assert all(field.lorax and field.ours for field in FIELDS) and all(all(row) for row in ANSWERS)


@pytest.mark.parametrize(("route", "field"), per_route("honoured"))
def test_an_honoured_field_is_taken_and_judged(client: TestClient, route: str, field: Field) -> None:
    good, bad = OF_ROUTE.get((route, field.name)) or VALUES[field.name]
    beside = BESIDE.get(field.name, {})
    response = ask(client, route, **beside, **{field.name: good})
    assert response.status_code == 200, response.text
    assert f"`{field.name}" in refusal(ask(client, route, **beside, **{field.name: bad}))
    nothing = ask(client, route, **{field.name: None})
    if field.name in REQUIRED[route]:
        assert refusal(nothing) == f"Input validation error: missing field `{field.name}`"
    else:
        assert nothing.status_code == 200


@pytest.mark.parametrize(("route", "field"), per_route("accepted"))
def test_an_accepted_field_changes_nothing(client: TestClient, route: str, field: Field) -> None:
    answers = [ask(client, route), ask(client, route, **{field.name: "mine"})]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


@pytest.mark.parametrize(("route", "field"), per_route("refused"))
def test_a_refused_field_is_named(client: TestClient, route: str, field: Field) -> None:
    for value in ({"type": "whatever"}, 7, "auto please"):
        found = refusal(ask(client, route, **{field.name: value}))
        given = f"Given: {json.dumps(value)}"
        assert found == f"Input validation error: `{field.name}` is not implemented by this server. {given}"
    for harmless in (*field.harmless, None):
        assert ask(client, route, **{field.name: harmless}).status_code == 200


@pytest.mark.parametrize("route", BOTH)
def test_an_unknown_field_is_refused_by_name(client: TestClient, route: str) -> None:
    assert "`max_token` is not a field of this route. Given: 3" in refusal(ask(client, route, max_token=3))
    assert ask(client, route, max_token=None).status_code == 200
    typed = {"content-type": "application/json"}
    broken = json.dumps({**REQUIRED[route], "\ud800" * 50: 1})
    assert client.post(route, content=broken, headers=typed).status_code in (400, 422)
    assert client.post(route, content="{", headers=typed).status_code == 400
    assert client.post(route, content="{}").status_code == 415
    assert "the body must be an object" in refusal(client.post(route, json=[]))


def test_fields_that_do_not_go_together(client: TestClient) -> None:
    assert "`best_of` must be at least `n`, 3" in refusal(ask(client, TEXT, n=3, best_of=2))
    assert "`best_of` above `n`" in refusal(ask(client, TEXT, best_of=2, stream=True))
    told = {"echo": True, "logprobs": 0, "stream": True}
    assert "`echo` with `logprobs` is not implemented with `stream`" in refusal(ask(client, TEXT, **told))
    assert "`stream_options` may only" in refusal(ask(client, CHAT, stream_options={"include_usage": True}))
    assert "`top_logprobs` needs `logprobs`" in refusal(ask(client, CHAT, top_logprobs=2))
    assert "`max_tokens` or `max_completion_tokens`" in refusal(ask(client, CHAT, max_completion_tokens=9))
    assert "`n` must be at most 4. Given: 5" in refusal(ask(client, CHAT, n=5))
    assert "must be at most 4. Given: 6" in refusal(ask(client, TEXT, prompt=["a", "b", "c"], n=2))
    assert "`prompt` cannot be empty" in refusal(ask(client, TEXT, prompt=[]))
    assert "`prompt` cannot be empty" in refusal(ask(client, TEXT, prompt=["a", ""]))


def test_refusals_use_the_names_of_the_route(client: TestClient) -> None:
    long = "the quick brown fox " * 60
    assert "`prompt` must have less than" in refusal(ask(client, TEXT, prompt=long, max_tokens=None))
    messages = [{"role": "user", "content": long}]
    assert "`messages` must have less than" in refusal(ask(client, CHAT, messages=messages, max_tokens=None))
    for route in BOTH:
        assert "`model` holds the control character U+000A" in refusal(ask(client, route, model="a\nb"))
        assert "`max_tokens` must be strictly positive" in refusal(ask(client, route, max_tokens=0))
        assert "`stop` supports up to 4" in refusal(ask(client, route, stop=["a"] * 5))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "`messages` cannot be empty"),
        ("hello", "`messages` must be a list of messages"),
        (["hello"], "`messages[0]` must be an object"),
        ([{"content": "x"}], "missing field `messages[0].role`"),
        ([{"role": "user", "content": None}], "missing field `messages[0].content`"),
        ([{"role": "user", "content": 3}], "`messages[0].content` must be a string or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "`messages[0].content` must be a string or a list of parts of type text. Given: "
            '[{"type": "image_url"',
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "`messages[0].tool_calls` is not implemented by this server",
        ),
    ],
)
def test_messages_that_cannot_be_read(client: TestClient, messages: Any, why: str) -> None:
    assert why in refusal(ask(client, CHAT, messages=messages))


def test_parts_of_text_are_one_text_and_a_name_reaches_the_template(
    client: TestClient, served: Talker
) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]
    spelled = ask(client, CHAT, messages=[{"role": "user", "content": parts, "tool_calls": None}]).json()
    assert spelled["choices"] == ask(client, CHAT).json()["choices"]
    named = ask(client, CHAT, messages=[{"role": "user", "content": "the quick", "name": "eve"}]).json()
    expected = len(served.tokenizer("user(eve):the quick\nassistant:")["input_ids"])
    assert named["usage"]["prompt_tokens"] == expected != spelled["usage"]["prompt_tokens"]


@pytest.mark.parametrize("route", BOTH)
def test_a_streams_bytes_and_headers(client: TestClient, route: str) -> None:
    whole = ask(client, route, model="alice")
    response = ask(client, route, model="alice", stream=True, n=1)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n")
    assert lines[-1] == "" and lines[1::2] == [""] * (len(lines) // 2)
    *events, done = lines[:-1:2]
    assert done == "data: [DONE]" and all(line.startswith('data: {"id"') for line in events)
    assert response.headers["x-accel-buffering"] == "no"
    for headers in (response.headers, whole.headers):
        assert (headers["x-model-id"], headers["x-adapter-id"]) == ("tiny", "alice")
        assert headers["x-adapter-version"] == BUNDLE_ID
    usage = whole.json()["usage"]
    assert int(whole.headers["x-prompt-tokens"]) == usage["prompt_tokens"]
    assert int(whole.headers["x-generated-tokens"]) == usage["completion_tokens"] == 3
    assert int(whole.headers["x-total-tokens"]) == usage["total_tokens"]
    assert "x-adapter-id" not in ask(client, route).headers


def test_sampling_follows_the_fields(client: TestClient) -> None:
    """A completion is greedy until something asks for more; a chat is sampled until told not to."""

    def distinct(route: str, *, seeds: Any = range(6), **fields: Any) -> int:
        bodies = [{**REQUIRED[route], "max_tokens": 12, "seed": seed, **fields} for seed in seeds]
        answers = [client.post(route, json=body).json()["choices"][0] for body in bodies]
        return len({json.dumps(answer) for answer in answers})

    assert distinct(TEXT) == 1 and distinct(TEXT, temperature=1.0) > 1 and distinct(TEXT, n=1) > 1
    assert distinct(CHAT) > 1 and distinct(CHAT, temperature=0) == 1 and distinct(CHAT, seeds=[3, 3]) == 1


def test_without_a_chat_template_a_chat_is_refused(tmp_path: Path) -> None:
    with talker(tmp_path, template=None) as server, TestClient(server.app) as client:
        found = refusal(ask(client, CHAT), kind="template_error")
        assert found == "Failed applying chat template to inputs: the tokenizer has no chat template"
        assert refusal(ask(client, CHAT, guideline="x"), kind="template_error") == found
        assert ask(client, TEXT).status_code == 200


@pytest.mark.parametrize("template", ["{% for", "{{ messages[0].content.nothing.more }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_refused(tmp_path: Path, template: str) -> None:
    with talker(tmp_path, template=template) as server, TestClient(server.app) as client:
        found = refusal(ask(client, CHAT), kind="template_error")
        assert found.startswith("Failed applying chat template to inputs: ")


def test_a_template_that_needs_a_guideline(tmp_path: Path) -> None:
    template = "guideline {{ guideline }}: {{ messages[0].content }}"
    with talker(tmp_path, template=template) as server, TestClient(server.app) as client:
        found = refusal(ask(client, CHAT), kind="missing_template_variable")
        assert found == "Missing template vatiable: guideline"
        usage = ask(client, CHAT, guideline="be good").json()["usage"]
        rendered = "guideline be good: the quick"
        assert usage["prompt_tokens"] == len(server.tokenizer(rendered)["input_ids"])


def test_a_template_writes_the_special_tokens_and_the_tokenizer_does_not_again(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    template = "<eos>{{ messages[0].content }}"
    with (
        talker(tmp_path, template=template, tokenizer=tokenizer) as server,
        TestClient(server.app) as client,
    ):
        expected = server.tokenizer.apply_chat_template(REQUIRED[CHAT]["messages"], return_dict=False)
        assert ask(client, CHAT).json()["usage"]["prompt_tokens"] == len(expected)
        assert ask(client, TEXT).json()["usage"]["prompt_tokens"] == len(expected)


def test_models_come_in_pages(client: TestClient, served: Talker) -> None:
    served.bank.add("team/carol@home", tiny.lora(tiny.llama(), seed=9))
    try:
        everybody = client.get("/v1/models").json()
        names = ["tiny", "alice", "bob", "team/carol@home"]
        assert [model["id"] for model in everybody["data"]] == names
        assert (everybody["object"], everybody["has_more"]) == ("list", False)
        found: list[str] = []
        query: dict[str, Any] = {"limit": 3}
        while True:
            page = client.get("/v1/models", params=query).json()
            found += [model["id"] for model in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], found[-1])
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert found == names and len(page["data"]) == 1
        for prefix, fitting in {"al": ["alice"], "team/": ["team/carol@home"], "zoe": []}.items():
            begun = client.get("/v1/models", params={"prefix": prefix}).json()
            assert ([model["id"] for model in begun["data"]], begun["has_more"]) == (fitting, False)
        last = client.get("/v1/models", params={"after": names[-1]}).json()
        assert (last["data"], last["has_more"], last["last_id"]) == ([], False, None)
        for model in everybody["data"]:
            assert client.get(f"/v1/models/{model['id']}").json() == model
        parents = {model["id"]: model["parent"] for model in everybody["data"]}
        assert parents == {"tiny": None, "alice": "tiny", "bob": "tiny", "team/carol@home": "tiny"}
        assert everybody["data"][1]["version"] == BUNDLE_ID
        assert ask(client, TEXT, model="team/carol@home").json()["model"] == "team/carol@home"
    finally:
        served.bank.remove("team/carol@home")


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=many", "limit=10001", f"limit={'9' * 5000}", "limit=²", "after=nobody"],
)
def test_a_page_that_is_none_is_refused(client: TestClient, query: str) -> None:
    assert f"`{query.partition('=')[0]}` must be" in refusal(client.get(f"/v1/models?{query}"))


@pytest.mark.parametrize("name", ["nobody", "alice@dead", "a%2Fb", "%E2%98%83"])
def test_a_model_that_is_not_there_is_not_found(client: TestClient, name: str) -> None:
    response = client.get(f"/v1/models/{name}")
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
NEAR = JUNK | st.sampled_from([VALUES[name][0] for name in VALUES])


@pytest.mark.parametrize("route", BOTH)
@settings(max_examples=60)
@given(fields=st.data())
def test_no_body_breaks_the_server(client: TestClient, route: str, fields: st.DataObject) -> None:
    names = st.sampled_from(sorted(rows(route))) | st.text(max_size=5)
    body = fields.draw(st.dictionaries(names, NEAR, max_size=3))
    response = client.post(route, json={**REQUIRED[route], **LIMITED, **body})  # raises what a handler raises
    if response.status_code != 200:
        assert response.status_code in (422, 424)
        assert set(response.json()) == {"error", "error_type"}
    elif response.headers["content-type"] == "application/json":
        assert response.json()["choices"]
    else:
        assert response.text.endswith("data: [DONE]\n\n")
