"""LoRAX's response JSON, with the fields LoRAX's clients read. Requests are read in `api.requests`."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from soppu.errors import RequestError
from soppu.serve.api.requests import Json, ParsedRequest
from soppu.serve.engine.generation import Finish, ScoredToken, TokenEvent

_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}


def token_body(token: TokenEvent) -> Json:
    """One token."""
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
        "skipped": False,
    } | ({"alternative_tokens": _scored(token.alternatives)} if token.alternatives else {})


def answer_body(parsed: ParsedRequest, tokens: Sequence[TokenEvent], finish: Finish) -> Json:
    """The answer of `/generate`; `details` only where they were asked for."""
    body: Json = {"generated_text": _shown(parsed, finish)}
    if parsed.details:
        body["details"] = {
            "prompt_tokens": finish.prompt_tokens,
            **_sequence(tokens, finish),
            "skipped_tokens": 0,
            "prefill": _scored(finish.prefill),
            **_routed(parsed),
        }
        if finish.others:
            body["details"]["best_of_sequences"] = [_other(parsed, told, finish) for told in finish.others]
    return body


def stream_body(parsed: ParsedRequest, token: TokenEvent) -> Json:
    """One event of `/generate_stream`; text and details of the whole come with the last."""
    finish = token.finish
    return {
        "token": token_body(token),
        "generated_text": _shown(parsed, finish) if finish else None,
        "details": _details(finish) | _routed(parsed) if finish and parsed.details else None,
    }


def error_body(error: RequestError) -> Json:
    """LoRAX's error object."""
    return {"error": str(error), "error_type": error.error_type}


async def on_request_error(_: Request, error: Exception) -> Response:
    """The answer to a refused request, as an exception handler of starlette."""
    assert isinstance(error, RequestError)
    return JSONResponse(error_body(error), status_code=error.status, headers=_HEADERS.get(error.status))


def _sequence(tokens: Sequence[TokenEvent], finish: Finish) -> Json:
    """What is told of every text of a request."""
    return {
        "finish_reason": finish.reason,
        "generated_tokens": finish.generated_tokens,
        "seed": finish.seed,
        "tokens": [token_body(token) for token in tokens],
    }


def _other(parsed: ParsedRequest, tokens: Sequence[TokenEvent], best: Finish) -> Json:
    """A text that was not the best."""
    finish = tokens[-1].finish
    assert finish is not None
    prefill = _scored(best.prefill)  # of the same prompt
    return {"generated_text": _shown(parsed, finish), **_sequence(tokens, finish), "prefill": prefill}


def _scored(tokens: Sequence[ScoredToken]) -> list[Json]:
    return [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in tokens]


def _details(finish: Finish) -> Json:
    return {
        "finish_reason": finish.reason,
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "seed": finish.seed,
    }


def _routed(parsed: ParsedRequest) -> Json:
    """What the server's router made of the request; nothing where there is none."""
    return {"router": parsed.decision.told} if parsed.decision else {}


def _shown(parsed: ParsedRequest, finish: Finish) -> str:
    return parsed.generation.inputs + finish.text if parsed.parameters.return_full_text else finish.text
