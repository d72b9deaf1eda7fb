"""Every route of the server: what it takes and answers, and what LoRAX does there.

The OpenAPI document, docs/lorax.md and their tests are made from this list; a route that is not in it, or a
line that no route answers to, fails a test. The handlers are in the modules beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from soppu.serve.api import answers
from soppu.serve.api.openai.bodies import ChatBody, CompletionBody
from soppu.serve.api.requests import _Body
from soppu.serve.api.tokenizing import TokenizeBody

JSON, EVENTS, TEXT, HTML, BYTES = (
    "application/json",
    "text/event-stream",
    "text/plain",
    "text/html",
    "application/octet-stream",
)
ADMIN = "/soppu/v1/"
_GENERATING = (400, 413, 415, 422, 424, 429, 500, 503)
_UPLOADING = (401, 403, 413, 422, 507)
_NOT_THERE = "not there"


class GenerateBody(_Body):
    """A prompt, and how to go on with it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}]
        }
    )


@dataclass(frozen=True)
class Operation:
    """One method of one path; `path` as starlette writes it. `ours` is how we differ from `lorax`."""

    method: str
    path: str
    what: str
    lorax: str
    ours: str
    body: type[BaseModel] | str | None = None  # a string is a media type
    answers: tuple[type[BaseModel] | str, ...] = ()  # of a 200; none is an empty one
    refusals: tuple[int, ...] = ()
    query: tuple[str, ...] = ()
    made: bool = False  # 201 where it is new

    @property
    def admin(self) -> bool:
        """Whether the admin token is needed."""
        return self.path.startswith(ADMIN)


def _generating(path: str, what: str, answered: tuple[type[BaseModel] | str, ...], ours: str) -> Operation:
    return Operation(
        "POST", path, what, what, ours, body=GenerateBody, answers=answered, refusals=_GENERATING
    )


def _openai(path: str, what: str, body: type[BaseModel], ours: str) -> Operation:
    return Operation("POST", path, what, what, ours, body=body, answers=(JSON, EVENTS), refusals=_GENERATING)


def _health(path: str) -> Operation:
    ours = "the same of the engine's last steps; 503 too while it stops, which a probe reads as not ready"
    what = "200 with an empty body while generations succeed, else 503"
    return Operation("GET", path, what, what, ours, refusals=(503,))


def _admin(method: str, path: str, what: str, answer: type[BaseModel], *more: int) -> Operation:
    refusals = (401, 403, *more)
    return Operation(method, ADMIN + path, what, _NOT_THERE, what, answers=(answer,), refusals=refusals)


def _put(path: str, what: str, answer: type[BaseModel]) -> Operation:
    return Operation(
        "PUT",
        ADMIN + path,
        what,
        _NOT_THERE,
        what,
        body=BYTES,
        answers=(answer,),
        refusals=_UPLOADING,
        made=True,
    )


_BEFORE = "what is wrong before the first token has its own status, also where a stream was asked for"
OPERATIONS = (
    _generating(
        "/",
        "Generate; a list of one, or a stream where `stream` is true",
        (answers.GeneratedList, EVENTS),
        _BEFORE,
    ),
    _generating("/invocations", "As `POST /`, for SageMaker", (answers.GeneratedList, EVENTS), _BEFORE),
    _generating("/generate", "Generate; one object", (answers.Generated,), "the same"),
    _generating("/generate_stream", "Generate; server-sent events, one a token", (EVENTS,), _BEFORE),
    _openai(
        "/v1/completions",
        "OpenAI's completions",
        CompletionBody,
        "the fields below say how",
    ),
    _openai(
        "/v1/chat/completions",
        "OpenAI's chat completions",
        ChatBody,
        "the fields below say how",
    ),
    Operation(
        "GET",
        "/v1/models",
        "The base model and everybody who is served, in pages",
        _NOT_THERE,
        "OpenAI's list, `limit` and `after` for pages, `prefix` to search",
        answers=(JSON,),
        refusals=(422,),
        query=("limit", "after", "prefix"),
    ),
    Operation(
        "GET",
        "/v1/models/{id:path}",
        "One model by its id, also a version of a user",
        _NOT_THERE,
        "OpenAI's model",
        answers=(JSON,),
        refusals=(404, 422),
    ),
    Operation(
        "POST",
        "/tokenize",
        "The tokens of a text, with the characters each stands for",
        "any length, by a fast tokenizer",
        "the same; at most 100,000 characters",
        body=TokenizeBody,
        answers=(answers.Tokenized,),
        refusals=(400, 404, 413, 415, 422),
    ),
    Operation(
        "GET",
        "/info",
        "Model, limits and version",
        "model, limits and version; nothing of adapters",
        "LoRAX's fields, then ours: base hash, active bundle, how many are loaded, wait and run",
        answers=(answers.Info,),
    ),
    *map(_health, ("/", "/health", "/ping")),
    Operation(
        "GET",
        "/startup",
        "200 with an empty body once one token was really generated",
        "generates for `Who?`; 500 where the text is empty",
        "the same; a token without text counts",
        refusals=(424, 429, 500, 503),
    ),
    Operation(
        "GET",
        "/metrics",
        "Figures for Prometheus; as JSON for `Accept: application/json`",
        "no figure of any adapter",
        "LoRAX's names where we have the figure; each adapter's requests, tokens, latency and residency",
        answers=(TEXT, answers.Figures),
    ),
    Operation(
        "GET", "/docs", "The routes for people", "Swagger UI", "one page without scripts", answers=(HTML,)
    ),
    Operation(
        "GET",
        "/api-doc/openapi.json",
        "This document",
        "nine of the paths",
        "every route",
        answers=(answers.Document,),
    ),
    _admin("GET", "bundles", "Every loaded bundle with its users", answers.Bundles),
    _put("bundles/{bundle_id}", "Load a bundle file beside the others; the id is its SHA-256", answers.Put),
    Operation(
        "POST",
        ADMIN + "bundles/{bundle_id}/activate",
        "Serve plain names from it",
        _NOT_THERE,
        "Serve plain names from it; with `instead_of`, only where that bundle is active",
        answers=(answers.Switched,),
        refusals=(401, 403, 404, 409, 415, 422, 507),
        query=("instead_of",),
    ),
    _admin(
        "DELETE", "bundles/{bundle_id}", "Forget a bundle and its file", answers.Deleted, 404, 409, 422, 507
    ),
    _admin("POST", "deactivate", "Serve plain names from no bundle", answers.Switched, 415, 422, 507),
    _admin("GET", "adapters", "Every loaded PEFT adapter", answers.Adapters),
    _put("adapters/{name:path}", "Load a PEFT folder, or replace it; the body is a tar", answers.Named),
    _admin("DELETE", "adapters/{name:path}", "Forget a PEFT adapter", answers.Deleted, 404, 507),
    _admin("GET", "users/{user:path}", "Which version a plain name is served by", answers.User, 404, 422),
    Operation(
        "GET",
        ADMIN + "basis",
        "The basis of the active bundle, which a new user trains in",
        _NOT_THERE,
        "safetensors; `cluster` of several; headers say which bundle, basis, and how many there are",
        answers=(BYTES,),
        refusals=(401, 409, 422, 507),
        query=("cluster",),
    ),
    Operation(
        "POST",
        ADMIN + "join",
        "Add a user to the active bundle by their core, and serve it",
        _NOT_THERE,
        "one row more, nobody else touched; the body is a tar of the core's folder",
        body=BYTES,
        answers=(answers.NewJoin,),
        refusals=(401, 403, 409, 413, 422, 424, 429, 503, 507),
        query=("user", "replace"),
        made=True,
    ),
    _admin("GET", "joined", "Who joined here and is in no registry yet", answers.Joined, 507),
    Operation(
        "GET",
        ADMIN + "joined/{number}",
        "The core of a join, a tar of its folder",
        _NOT_THERE,
        "The core of a join, a tar of its folder",
        answers=(BYTES,),
        refusals=(401, 404, 422, 507),
    ),
    _admin(
        "DELETE",
        "joined/{number}",
        "Let go of a join that a registry has taken over; the user goes on being served",
        answers.Deleted,
        404,
        422,
        507,
    ),
)
# LoRAX's routes for models that are not language models.
NOT_SERVED = ("/embed", "/v1/embeddings", "/classify", "/classify_batch")

GENERATING = frozenset(o.path for o in OPERATIONS if o.refusals == _GENERATING)
