"""Ways in which alice may try to reach bob's model. Each is one request; none may reach a server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

GENERATE, CHAT, TEXT = "/generate", "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Attempt:
    """One request as alice sends it; `status` is how it has to be answered."""

    name: str
    path: str
    status: int
    body: Any = None  # an object, or the bytes themselves
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"
    key: bool = True  # alice's is shown

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def _lorax(name: str, status: int, *, path: str = GENERATE, **parameters: Any) -> Attempt:
    return Attempt(name, path, status, {"inputs": "hi", "parameters": parameters})


def _text(name: str, status: int, **fields: Any) -> Attempt:
    return Attempt(name, TEXT, status, {"prompt": "hi", **fields})


def _chat(name: str, status: int, **fields: Any) -> Attempt:
    return Attempt(name, CHAT, status, {"messages": SAID, **fields})


def _raw(name: str, status: int, body: bytes, *, path: str = GENERATE) -> Attempt:
    return Attempt(name, path, status, body)


def _header(name: str, value: str, status: int) -> Attempt:
    return Attempt(f"header {name}", GENERATE, status, {"inputs": "hi"}, ((name, value),))


def _get(name: str, path: str, status: int, *, method: str = "GET", body: Any = b"") -> Attempt:
    return Attempt(name, path, status, body, method=method)


_NAMES = {
    "another user": "bob",
    "own name in another case": "ALICE",
    "a user whose name differs in case": "Alice",
    "a version of another": "bob@" + "0" * 64,
    "a version of one's own": "alice@0f3c",
    "a Cyrillic twin": "\u0430lice",
    "a full-width twin": "\uff41lice",
    "a zero-width joiner": "al\u200dice",
    "a soft hyphen": "ali\u00adce",
    "a right-to-left mark": "\u202ebob",
    "a combining accent": "alice\u0301",
    "a trailing blank": "alice ",
    "a leading blank": " bob",
    "a new line": "alice\nbob",
    "a carriage return": "alice\r\nx-adapter-id: bob",
    "a NUL byte": "alice\x00bob",
    "a path upwards": "../bob",
    "a path from one's own": "alice/../bob",
    "a path of LoRAX's": "adapters/bob/0123456789abcdef",
    "a path from the root": "/data/adapters/bob",
    "an escaped name": "%62ob",
    "a bucket": "s3://bucket/bob",
    "a hub's id": "predibase/bob",
    "two names": "alice,bob",
    "a pattern": "*",
    "the base model": "tiny",
    "a long name": "b" * 100_000,
}

_FORMS = [
    attempt
    for what, name in _NAMES.items()
    for attempt in (
        _lorax(f"{what}, LoRAX's", 403, adapter_id=name),
        _text(f"{what}, OpenAI's", 403, model=name),
    )
]

_FIELDS = [
    _chat("another's in a chat", 403, model="bob"),
    _chat("another's in a streamed chat", 403, model="bob", stream=True),
    _text("another's in a stream", 403, model="bob", stream=True),
    _lorax("another's in a stream of LoRAX's", 403, path="/generate_stream", adapter_id="bob"),
    _lorax("another's at the root", 403, path="/", adapter_id="bob"),
    _text("another's for many prompts", 403, model="bob", prompt=["a", "b"]),
    _text("a list of models", 422, model=["alice", "bob"]),
    _text("an object as a model", 422, model={"id": "bob"}),
    _text("a number as a model", 422, model=1),
    _text("true as a model", 422, model=True),
    _text("a model of its own for each prompt", 422, prompt=[{"model": "bob", "text": "hi"}]),
    _text("adapter_id beside the model", 403, model="alice", adapter_id="bob"),
    _text("lora_request beside the model", 403, model="alice", lora_request="bob"),
    _text("lora_path", 422, lora_path="bob"),
    _text("extra_body, unpacked by nobody", 422, extra_body={"model": "bob"}),
    _text("parameters in OpenAI's body", 403, parameters={"adapter_id": "bob"}),
    _text("token ids", 422, prompt=[1, 2, 3]),
    _lorax("model beside the parameters", 403, model="bob"),
    Attempt("adapter_id beside the parameters", GENERATE, 403, {"inputs": "hi", "adapter_id": "bob"}),
    Attempt("model beside inputs", GENERATE, 403, {"inputs": "hi", "model": "bob"}),
    Attempt("parameters as a list", GENERATE, 422, {"inputs": "hi", "parameters": [{"adapter_id": "bob"}]}),
    Attempt("many requests in one", GENERATE, 422, [{"inputs": "hi", "parameters": {"adapter_id": "bob"}}]),
    Attempt("many inputs in one", GENERATE, 422, {"inputs": ["hi"], "parameters": {}}),
    Attempt(
        "requests under another key", GENERATE, 422, {"inputs": "hi", "requests": [{"adapter_id": "bob"}]}
    ),
    _lorax("a key with a blank", 422, **{"adapter_id ": "bob"}),
    _lorax("a key in another case", 422, Adapter_ID="bob"),
    _lorax("a key of a twin", 422, adapter_іd="bob"),
    _lorax("merged adapters", 422, merged_adapters={"ids": ["alice", "bob"], "weights": [0, 1]}),
    _lorax(
        "merged adapters that end LoRAX",
        422,
        merged_adapters={"ids": ["bob"], "weights": [1], "merge_strategy": "x"},
    ),
    _lorax("a control character that ends LoRAX", 403, path="/generate_stream", adapter_id="alice\x01"),
    _lorax("adapters from the hub", 422, adapter_source="hub"),
    _lorax("adapters from a bucket", 422, adapter_source="s3"),
    _lorax("adapters of Predibase", 422, adapter_source="pbase", api_token="t"),
    _lorax("a token for the hub", 422, api_token="hf_x"),
    _text("adapters from the hub, OpenAI's", 422, adapter_source="hub"),
    _chat(
        "an image that a server would fetch",
        422,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://serving/soppu/v1/bundles"}}],
            }
        ],
    ),
    _chat("tools", 422, tools=[{"type": "function"}]),
]

_BYTES = [
    _raw("a key twice", 422, b'{"inputs":"hi","parameters":{"adapter_id":"alice","adapter_id":"bob"}}'),
    _raw(
        "a key twice, the other way round",
        422,
        b'{"inputs":"hi","parameters":{"adapter_id":"bob","adapter_id":"alice"}}',
    ),
    _raw(
        "a key twice, once escaped",
        422,
        b'{"inputs":"hi","parameters":{"adapter_id":"alice","adapter\\u005fid":"bob"}}',
    ),
    _raw("parameters twice", 422, b'{"inputs":"hi","parameters":{},"parameters":{"adapter_id":"bob"}}'),
    _raw("model twice", 422, b'{"prompt":"hi","model":"alice","model":"bob"}', path=TEXT),
    _raw("an escaped name of another", 403, b'{"inputs":"hi","parameters":{"adapter_id":"\\u0062ob"}}'),
    _raw("half a surrogate pair", 422, b'{"inputs":"hi","parameters":{"adapter_id":"\\ud800"}}'),
    _raw("two bodies", 400, b'{"inputs":"hi"}{"inputs":"hi","parameters":{"adapter_id":"bob"}}'),
    _raw("a comment", 400, b'{"inputs":"hi"/*,"parameters":{"adapter_id":"bob"}*/}'),
    _raw("UTF-16", 400, '{"inputs":"hi","parameters":{"adapter_id":"bob"}}'.encode("utf-16")),
    _raw("a byte-order mark", 400, b'\xef\xbb\xbf{"inputs":"hi","parameters":{"adapter_id":"bob"}}'),
    _raw("bytes that are no UTF-8", 400, b'{"inputs":"hi","parameters":{"adapter_id":"bo\xff"}}'),
    _raw("nothing", 400, b""),
    _raw("a number", 422, b"1"),
    _raw("no number", 422, b'{"inputs":"hi","parameters":{"temperature":NaN,"adapter_id":"bob"}}'),
    _raw(
        "a huge whole number", 400, b'{"inputs":"hi","parameters":{"max_new_tokens":' + b"9" * 10_000 + b"}}"
    ),
    _raw("a huge number", 422, b'{"inputs":"hi","parameters":{"temperature":1e999}}'),
    _raw("many tokens", 422, b'{"inputs":"hi","parameters":{"max_new_tokens":99999999}}'),
    _raw("a deep body", 422, b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _raw(
        "a less deep body",
        422,
        b'{"inputs":"hi","parameters":{"response_format":' + b'{"a":' * 40 + b"1" + b"}" * 42,
    ),
    _raw("a large body", 413, b'{"inputs":"' + b"x" * (1 << 20) + b'"}'),
]

_AS_JSON = {"inputs": "hi", "parameters": {"adapter_id": "bob"}}
_HEADERS = [
    _header("x-adapter-id", "bob", 403),
    _header("X-Lora-Id", "bob", 403),
    _header("x-model", "bob", 403),
    _header("x-user-id", "bob", 403),
    _header("x-forwarded-user", "bob", 403),
    _header("remote-user", "bob", 403),
    _header("x-adapter-source", "hub", 422),
    _header("x-original-url", "/soppu/v1/bundles", 422),
    _header("x-http-method-override", "PUT", 422),
    Attempt(
        "the header twice",
        GENERATE,
        403,
        {"inputs": "hi"},
        (("x-adapter-id", "alice"), ("x-adapter-id", "bob")),
    ),
    Attempt(
        "a form",
        GENERATE,
        415,
        b"inputs=hi&adapter_id=bob",
        (("content-type", "application/x-www-form-urlencoded"),),
    ),
    Attempt("plain text", GENERATE, 415, _AS_JSON, (("content-type", "text/plain"),)),
    Attempt(
        "a multipart body", GENERATE, 415, _AS_JSON, (("content-type", "multipart/form-data; boundary=x"),)
    ),
    Attempt(
        "two content types",
        GENERATE,
        415,
        _AS_JSON,
        (("content-type", "application/json"), ("content-type", "text/plain")),
    ),
    Attempt("a compressed body", GENERATE, 415, _AS_JSON, (("content-encoding", "gzip"),)),
    Attempt("no key", GENERATE, 401, _AS_JSON, key=False),
    Attempt(
        "a made-up key",
        GENERATE,
        401,
        _AS_JSON,
        (("authorization", "Bearer soppu_user_" + "A" * 43),),
        key=False,
    ),
    Attempt(
        "a key as a password", GENERATE, 401, _AS_JSON, (("authorization", "Basic Ym9iOmJvYg=="),), key=False
    ),
    Attempt("a second key", GENERATE, 401, _AS_JSON, (("authorization", "Bearer soppu_user_x"),)),
    Attempt(
        "an unsigned token",
        GENERATE,
        401,
        _AS_JSON,
        (("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJib2IifQ."),),
        key=False,
    ),
]

_PATHS = [
    _get("another's model", "/v1/models/bob", 404),
    _get("another's model, escaped", "/v1/models/%62ob", 404),
    _get("another's model, from one's own", "/v1/models/alice%2f..%2fbob", 404),
    _get("nobody's model", "/v1/models/nobody", 404),
    _get("a query for another", "/v1/models?prefix=b", 422),
    _get("the servers' bundles", "/soppu/v1/bundles", 404),
    _get("the servers' user", "/soppu/v1/users/bob", 404),
    _get("the servers' bundles, escaped", "/%73oppu/v1/bundles", 404),
    _get("the servers' bundles, doubled", "//soppu/v1/bundles", 404),
    _get("upwards to the servers' bundles", "/v1/%2e%2e/soppu/v1/bundles", 404),
    _get("an adapter put", "/soppu/v1/adapters/alice", 404, method="PUT"),
    _get("a bundle switched", f"/soppu/v1/bundles/{'0' * 64}/activate", 404, method="POST"),
    _get("the list of servers with a user's key", "/soppu/v1/servers", 403),
    _get("the figures with a user's key", "/metrics", 403),
    _get(
        "vLLM's own switch",
        "/v1/load_lora_adapter",
        404,
        method="POST",
        body={"lora_name": "alice", "lora_path": "bob"},
    ),
    _get("vLLM's plugin", "/soppu/v1/info", 404),
    _get("the tokenizer", "/tokenize", 404, method="POST", body={"inputs": "hi"}),
    _get("a whole address", "/" + quote("http://serving:8080/generate"), 404),
    Attempt("another in the query", f"{GENERATE}?adapter_id=bob", 422, {"inputs": "hi"}),
    Attempt("another in the path", f"{GENERATE}/bob", 404, {"inputs": "hi"}),
    Attempt("a slash at the end", f"{GENERATE}/", 404, {"inputs": "hi"}),
    Attempt("a new line in the path", f"{GENERATE}%0a", 404, {"inputs": "hi"}),
    Attempt("a NUL in the path", f"{GENERATE}%00", 404, {"inputs": "hi"}),
    Attempt("a twin of the path", "/v1/COMPLETIONS", 404, {"prompt": "hi", "model": "bob"}),
    Attempt("SageMaker's route", "/invocations", 404, _AS_JSON),
    _get("a method that is not there", GENERATE, 405, method="PUT", body=_AS_JSON),
]

ATTEMPTS = (*_FORMS, *_FIELDS, *_BYTES, *_HEADERS, *_PATHS)
