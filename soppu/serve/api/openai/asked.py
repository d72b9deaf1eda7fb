"""What a body of OpenAI's asks for, in LoRAX's parameters, which `soppu.serve.api.requests` judges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from soppu.errors import RequestError
from soppu.serve.api.openai.bodies import Body, ChatBody, CompletionBody
from soppu.serve.api.requests import Json, ParsedRequest, parse_request
from soppu.serve.refusals import invalid

_AS_THEY_ARE = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_k",
    "adapter_source",
    "api_token",
)


@dataclass(frozen=True)
class Limits:
    """What the server says about itself: its base model's id, and how many candidates a request may have."""

    model_id: str
    candidates: int


@dataclass(frozen=True)
class Asked:
    """A request of either route: `candidates` are `best_of` of each prompt, of which `n` are answered."""

    candidates: tuple[ParsedRequest, ...]
    best_of: int
    n: int
    logprobs: bool
    echo: bool  # the prompt comes first in the text

    def before(self, each: int) -> list[str]:
        """What comes before the text of each choice, `each` of every prompt."""
        prompts = [
            parsed.generation.inputs if self.echo else "" for parsed in self.candidates[:: self.best_of]
        ]
        return [prompt for prompt in prompts for _ in range(each)]


def ask_completion(body: CompletionBody, limits: Limits) -> Asked:
    """What a completion asks for. RequestError 422."""
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise invalid(f"`best_of` must be at least `n`, {n}. Given: {best_of}")
    if best_of > n and body.stream:
        raise invalid(f"`best_of` above `n` is not implemented with `stream`. Given: {best_of}")
    told = bool(body.echo) and body.logprobs is not None  # the prompt's logprobs too
    if told and body.stream:
        raise invalid("`echo` with `logprobs` is not implemented with `stream`. Given: true")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise invalid("`prompt` cannot be empty")
    parameters = _parameters(body, limits) | {
        "do_sample": body.n is not None or body.temperature is not None,
        "max_new_tokens": body.max_tokens,
        "return_k_alternatives": body.logprobs or None,
        "decoder_input_details": told,
    }
    candidates = _candidates(body, [(prompt, parameters) for prompt in prompts], best_of, limits)
    return Asked(candidates, best_of, n, logprobs=body.logprobs is not None, echo=bool(body.echo))


def ask_chat(body: ChatBody, prompt: str, limits: Limits) -> Asked:
    """What a chat completion asks for, its messages rendered as `prompt`. RequestError 422."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid(f"`top_logprobs` needs `logprobs`. Given: {body.top_logprobs}")
    tokens = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(tokens) > 1:
        raise invalid("at most one of `max_tokens` or `max_completion_tokens` may be provided")
    parameters = _parameters(body, limits) | {
        "do_sample": True,
        "max_new_tokens": next(iter(tokens), None),
        "return_k_alternatives": body.top_logprobs or None,
        "response_format": _response_format(body.response_format),
    }
    n = body.n or 1
    candidates = tuple(
        # the template has written the beginning-of-text token where the model wants one
        replace(parsed, generation=replace(parsed.generation, add_special_tokens=False))
        for parsed in _candidates(body, [(prompt, parameters)], n, limits)
    )
    return Asked(candidates, n, n, logprobs=bool(body.logprobs), echo=False)


def in_words_of(body: Body, error: RequestError) -> RequestError:
    """A refusal of LoRAX's parameters, in the names of this body's fields."""
    names = {"adapter_id": "model", "inputs": "prompt", "max_new_tokens": "max_tokens"}
    names["return_k_alternatives"] = "logprobs"
    if isinstance(body, ChatBody):
        names |= {"inputs": "messages", "return_k_alternatives": "top_logprobs"}
        if body.max_tokens is None:
            names["max_new_tokens"] = "max_completion_tokens"

    def name(match: re.Match[str]) -> str:
        return f"`{names.get(match[1], match[1])}`"

    text = re.sub(r"`(?:parameters\.)?(\w+)`", name, str(error))
    return RequestError(text, status=error.status, error_type=error.error_type)


def _parameters(body: Body, limits: Limits) -> Json:
    if body.stream_options is not None and not body.stream:
        raise invalid("`stream_options` may only be provided with `stream`")
    same: Json = {name: getattr(body, name) for name in _AS_THEY_ARE}
    return {
        **same,
        "adapter_id": "" if body.model == limits.model_id else body.model,
        "ignore_eos_token": bool(body.ignore_eos_token),
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or [],
    }


def _response_format(value: dict[str, Any] | None) -> Json | None:
    """OpenAI's `response_format` as LoRAX's. Text is what comes without one."""
    if value is None or value.get("type") == "text":
        return None
    named = value.get("json_schema")
    return {"type": value.get("type"), "schema": named.get("schema")} if isinstance(named, dict) else value


def _candidates(
    body: Body, asked: Sequence[tuple[str, Json]], each: int, limits: Limits
) -> tuple[ParsedRequest, ...]:
    if (total := len(asked) * each) > limits.candidates:
        what = "prompts times `n` or `best_of`" if isinstance(body, CompletionBody) else "`n`"
        raise invalid(f"{what} must be at most {limits.candidates}. Given: {total}")
    seeds = [None if body.seed is None else (body.seed + index) % 2**64 for index in range(each)]
    return tuple(
        parse_request(
            {"inputs": prompt, "parameters": {**parameters, "seed": seed}}, stream=bool(body.stream)
        )
        for prompt, parameters in asked
        for seed in seeds
    )
