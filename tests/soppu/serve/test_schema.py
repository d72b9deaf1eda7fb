"""LoRAX's parameter rules: what is accepted, what is refused, and that nothing is silently ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu.errors import RequestError
from soppu.serve.api.requests import parse_json, parse_request
from soppu.serve.engine.sampling import Sampling
from soppu.serve.names import header_value


def parse(parameters: dict[str, Any] | None = None, **top: Any) -> Any:
    body = {"inputs": "x", **top}
    return parse_request(body if parameters is None else {**body, "parameters": parameters})


def refused(parameters: dict[str, Any] | None = None, **top: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(parameters, **top)
    return caught.value


def test_only_inputs_are_needed() -> None:
    parsed = parse()
    assert parsed.generation.inputs == "x"
    assert parsed.generation.adapter_id == ""
    assert parsed.generation.max_new_tokens is None
    assert parsed.generation.sampling == Sampling()
    asked = parsed.parameters
    assert (asked.details, asked.return_full_text, parsed.stream) == (False, False, False)


def test_what_the_lorax_client_sends_is_accepted() -> None:
    parsed = parse(
        {
            "adapter_id": "u/1",
            "adapter_source": "local",
            "merged_adapters": None,
            "api_token": None,
            "do_sample": False,
            "max_new_tokens": None,
            "ignore_eos_token": False,
            "repetition_penalty": None,
            "return_full_text": False,
            "stop": [],
            "seed": None,
            "temperature": None,
            "top_k": None,
            "top_p": None,
            "truncate": None,
            "typical_p": None,
            "best_of": None,
            "watermark": False,
            "details": True,
            "decoder_input_details": False,
            "return_k_alternatives": None,
            "response_format": None,
        },
        stream=True,
    )
    assert parsed.generation.adapter_id == "u/1"
    assert parsed.parameters.details and parsed.stream and parsed.parameters.adapter_source == "local"


def test_unknown_keys_are_ignored_and_a_route_may_fix_the_stream_flag() -> None:
    assert parse({"no_such": 1}, model="x").generation.inputs == "x"
    assert parse_request({"inputs": "x", "stream": True}, stream=False).stream is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-44),
        ("repetition_penalty", 1001),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("truncate", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", None),
        ("stop", "x"),
        ("stop", [1]),
        ("stop", [""]),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("do_sample", None),
        ("details", 1),
        ("ignore_eos_token", None),
        ("adapter_id", 7),
        ("adapter_source", 7),
        ("api_token", 7),
        ("return_full_text", "yes"),
        ("best_of", 0),
        ("best_of", True),
        ("typical_p", 1.0),
        ("typical_p", 0),
        ("typical_p", True),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", "1"),
        ("presence_penalty", -2.1),
        ("return_k_alternatives", 0),
        ("return_k_alternatives", 21),
        ("decoder_input_details", 1),
        ("response_format", "json"),
        ("response_format", {}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": ["text"]}),
        ("response_format", {"type": "json_schema", "schema": True}),
        ("response_format", {"type": "text", "schema": {}}),
        ("watermark", 1),
        ("apply_chat_template", "yes"),
        ("merged_adapters", [1]),
        ("merged_adapters", {"ids": "a", "weights": [1]}),
    ],
)
def test_a_wrong_value_is_a_422_that_names_the_parameter(name: str, value: object) -> None:
    error = refused({name: value})
    assert (error.status, error.error_type) == (422, "validation")
    assert str(error).startswith("Input validation error: ")
    assert name in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("watermark", True),
        ("apply_chat_template", True),
        ("merged_adapters", {"ids": ["a"], "weights": [1.0]}),
        ("merged_adapters", {"ids": ["a", "b"], "weights": [1, 2], "merge_strategy": "ties"}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_not_ignored(name: str, value: object) -> None:
    error = refused({name: value})
    assert error.status == 422
    assert f"`{name}` is not implemented" in str(error)
    assert parse({name: None}).generation.inputs == "x"


@pytest.mark.parametrize(
    "name",
    [
        "best_of",
        "typical_p",
        "frequency_penalty",
        "presence_penalty",
        "return_k_alternatives",
        "response_format",
        "decoder_input_details",
    ],
)
def test_a_null_asks_for_nothing(name: str) -> None:
    assert parse({name: None}).generation == parse().generation


@pytest.mark.parametrize(("name", "value"), [("best_of", 1), ("typical_p", 0.999), ("watermark", False)])
def test_what_changes_nothing_is_accepted(name: str, value: object) -> None:
    assert parse({name: value}).generation.inputs == "x"


def test_what_cannot_be_streamed_is_refused_with_loraxs_words() -> None:
    error = refused({"best_of": 2, "do_sample": True}, stream=True)
    assert "`best_of` != 1 is not supported when streaming tokens" in str(error)
    error = refused({"decoder_input_details": True}, stream=True)
    assert "`decoder_input_details` == true is not supported when streaming tokens" in str(error)


def test_inputs_and_parameters_themselves_are_checked() -> None:
    assert "missing field `inputs`" in str(_error(lambda: parse_request({})))
    assert "cannot be empty" in str(refused(inputs=""))
    assert "`inputs`" in str(refused(inputs=None))
    assert "`parameters`" in str(_error(lambda: parse_request({"inputs": "x", "parameters": None})))
    assert "`stream`" in str(refused(stream=None))
    assert "at most one of" in str(refused({"adapter_id": "a", "merged_adapters": {"ids": []}}))


@pytest.mark.parametrize("name", ["a\nb", "\x00", "tab\t", "\u2028", "\x85"])
def test_control_characters_in_an_adapter_id_are_refused(name: str) -> None:
    error = refused({"adapter_id": name})
    assert error.status == 422 and "control character U+" in str(error)


def test_a_lone_surrogate_is_refused_before_it_reaches_a_tokenizer() -> None:
    assert refused(inputs="\ud800").status == 422
    assert refused({"stop": ["\udfff"]}).status == 422


def test_an_unknown_adapter_source_is_a_424_as_in_lorax() -> None:
    error = refused({"adapter_id": "a", "adapter_source": "ftp"})
    assert (error.status, error.error_type) == (424, "generation")
    assert "Invalid source 'ftp'" in str(error)
    for source in ("hub", "S3", "pbase"):
        error = refused({"adapter_id": "alice", "adapter_source": source})
        assert (error.status, error.error_type) == (424, "generation")
        assert f"Invalid source {source.lower()!r}" in str(error) and "fetches nothing" in str(error)
    assert parse({"adapter_id": "alice", "adapter_source": "Local"}).parameters.adapter_source == "local"
    assert parse({"adapter_source": "HUB"}).parameters.adapter_source == "hub"


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
        ({"temperature": 0}, False),
        ({"temperature": 1e-40}, False),
        ({"temperature": 1e-5}, True),
        ({"temperature": 0, "do_sample": True, "top_k": 3}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"typical_p": 0.95}, True),
        ({"typical_p": 0.95, "temperature": 0}, False),
        ({"frequency_penalty": 1, "presence_penalty": 1}, False),
        ({"best_of": 2, "temperature": 1.0}, True),
        ({"best_of": 2, "do_sample": True}, True),
    ],
)
def test_when_a_request_samples(parameters: dict[str, Any], samples: bool) -> None:
    assert parse(parameters).generation.sampling.do_sample is samples


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"inputs": NaN}', b"{" + b"1" * 5000])
def test_a_body_that_is_not_json_is_a_400(body: bytes) -> None:
    error = _error(lambda: parse_json(body))
    assert error.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": "\\ud800"}',
        '{"inputs": "x"}'.encode("utf-16"),
        b'{"inputs": "x"} {}',
        b'{"a":' * 300 + b"1",
    ],
)
def test_json_that_lorax_cannot_read_is_a_400_too(body: bytes) -> None:
    error = _error(lambda: parse_json(body))
    assert (error.status, error.error_type) == (400, "bad_request")
    assert str(error).startswith("Failed to parse the request body as JSON: ")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"seed": True}, "`parameters.seed` must be a whole number between 0 and 2^64 - 1. Given: true"),
        ({"top_p": "1"}, '`parameters.top_p` must be a number. Given: "1"'),
        ({"temperature": 1e31}, "`parameters.temperature` must be a number. Given: 1e+31"),
        ({"stop": ["a", 1]}, '`parameters.stop` must be a list of strings. Given: ["a", 1]'),
        ({"details": None}, "`parameters.details` must be true or false. Given: null"),
        ({"adapter_id": ["a"]}, '`parameters.adapter_id` must be a string of valid Unicode. Given: ["a"]'),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"temperature": -1}, "`temperature` must be non-negative. Given: -1.0"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0. Given: 3.0"),
        ({"presence_penalty": -3}, "`presence_penalty` must be >= -2.0 and <= 2.0. Given: -3.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0. Given: 1.0"),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "temperature": 0}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "top_k": 5, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        (
            {"response_format": {"type": "xml"}},
            '`response_format.type` must be one of text, json_object, json_schema. Given: "xml"',
        ),
        (
            {"merged_adapters": {"ids": []}},
            "at least one adapter ID must be provided when setting `adapters`",
        ),
        (
            {"merged_adapters": {"ids": ["a", "b"], "weights": [1]}},
            "number of adapter IDs must match number of adapter weights",
        ),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "slerp"}},
            "`merged_adapters.merge_strategy` must be one of linear, ties, dare_linear, dare_ties."
            ' Given: "slerp"',
        ),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1], "majority_sign_method": 7}},
            "`merged_adapters.majority_sign_method` must be one of total, frequency. Given: 7",
        ),
    ],
)
def test_the_words_of_a_refusal(parameters: dict[str, Any], message: str) -> None:
    assert str(refused(parameters)) == f"Input validation error: {message}"


def test_a_body_that_is_no_object_is_a_422() -> None:
    assert _error(lambda: parse_json(b"[1]")).status == 422


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "adapter_id",
        "stop",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "truncate",
        "details",
        "best_of",
        "watermark",
        "typical_p",
        "frequency_penalty",
        "response_format",
        "merged_adapters",
        "return_k_alternatives",
        "decoder_input_details",
    ]
)


@given(
    parameters=st.dictionaries(NAMES, JSON), top=st.dictionaries(st.sampled_from(["stream", "extra"]), JSON)
)
def test_any_json_is_parsed_or_refused_never_a_crash(parameters: dict[str, Any], top: dict[str, Any]) -> None:
    body = parse_json(json.dumps({"inputs": "x", "parameters": parameters, **top}).encode())
    try:
        parse_request(body)
    except RequestError as error:
        assert error.status in (422, 424)


@given(st.text(max_size=20))
def test_a_header_value_is_printable_ascii_and_leaves_ascii_alone(text: str) -> None:
    value = header_value(text)
    assert value.isascii() and all(" " <= character <= "~" for character in value)
    if all(" " <= character <= "~" for character in text):
        assert value == text


def _error(call: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value
