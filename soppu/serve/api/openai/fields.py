"""Every field of the two request bodies and of their answers: what LoRAX does with it, and what we do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

BOTH = ("/v1/completions", "/v1/chat/completions")
TEXT, CHAT = BOTH[:1], BOTH[1:]


@dataclass(frozen=True)
class Field:
    """One row. A refused field is taken where its value asks for nothing: one of `harmless`, or null."""

    name: str
    routes: tuple[str, ...]
    lorax: str
    ours: str
    how: Literal["honoured", "accepted", "refused"]
    harmless: tuple[Any, ...] = ()


def _honoured(name: str, routes: tuple[str, ...], lorax: str, ours: str = "as LoRAX") -> Field:
    return Field(name, routes, lorax, ours, "honoured")


def _accepted(name: str, routes: tuple[str, ...], lorax: str = "ignored") -> Field:
    return Field(name, routes, lorax, "accepted; says nothing about the answer", "accepted")


def _refused(name: str, routes: tuple[str, ...], *harmless: Any, lorax: str = "ignored") -> Field:
    taken = "".join(f", unless {value!r}" if not i else f" or {value!r}" for i, value in enumerate(harmless))
    return Field(name, routes, lorax, f"422 by name{taken}", "refused", harmless)


FIELDS = (
    _honoured(
        "model", BOTH, 'adapter id; "" or the base model\'s id is the base', "as LoRAX; `user@version`"
    ),
    _honoured("prompt", TEXT, "a string", "a string, or a list of them; token ids 422"),
    _honoured("messages", CHAT, "text and images, through the base's chat template", "text only; images 422"),
    _honoured("max_tokens", BOTH, "all that fits where it is absent"),
    _honoured("max_completion_tokens", CHAT, "ignored", "another name of `max_tokens`"),
    _honoured("temperature", TEXT, "1 where absent; does not sample by itself", "given: samples; 0: greedy"),
    _honoured("temperature", CHAT, "samples at 1 where absent; 0: greedy"),
    _honoured("top_p", BOTH, "0 < p <= 1"),
    _honoured("n", TEXT, "ignored, but samples where given", "n choices; samples where given"),
    _honoured("n", CHAT, "is `best_of`", "n choices"),
    _honoured("best_of", TEXT, "at most 2, needs sampling, forbids `seed`", "the `n` likeliest of so many"),
    _honoured("stream", BOTH, "events, then `data: [DONE]`"),
    _honoured("stream_options", BOTH, "ignored", "`include_usage`; `include_obfuscation` 422"),
    _honoured("stop", BOTH, "a list; kept in the text", "a string or a list; not part of the text"),
    _honoured("seed", BOTH, "a whole number", "as LoRAX; the i-th choice has `seed` + i"),
    _honoured("presence_penalty", BOTH, "-2 to 2", "as `/generate`"),
    _honoured("frequency_penalty", BOTH, "-2 to 2", "as `/generate`"),
    _honoured("repetition_penalty", BOTH, "> 0", "as `/generate`"),
    _honoured("top_k", BOTH, "> 0", "as `/generate`"),
    _honoured("ignore_eos_token", BOTH, "goes on after the end of a text", "as `/generate`"),
    _honoured("adapter_source", BOTH, "hub, local, s3 or pbase", "local; 424 for the others"),
    _honoured("api_token", BOTH, "goes to the hub", "as `/generate`"),
    _honoured("echo", TEXT, "the prompt comes first", "as LoRAX; with `logprobs` and `stream` 422"),
    _honoured(
        "logprobs", TEXT, "computed, not answered", "OpenAI's form, the prompt's with `echo`; up to 20 others"
    ),
    _honoured("logprobs", CHAT, "ignored", "OpenAI's form"),
    _honoured("top_logprobs", CHAT, "ignored", "up to 20, as `return_k_alternatives` of `/generate`"),
    _honoured("response_format", CHAT, "a JSON schema, in OpenAI's form or its own", "as `/generate`"),
    _honoured("guideline", CHAT, "a variable of the template"),
    _accepted("user", BOTH),
    _accepted("metadata", CHAT),
    _accepted("safety_identifier", CHAT),
    _accepted("prompt_cache_key", CHAT),
    _accepted("prompt_cache_options", CHAT),
    _accepted("prompt_cache_retention", CHAT),
    _refused("suffix", TEXT, ""),
    _refused("logit_bias", BOTH, {}),
    _refused("tools", CHAT, [], lorax="constrained JSON, not in streams"),
    _refused("tool_choice", CHAT, "none", "auto", lorax="which tool"),
    _refused("tool_prompt", CHAT, "", lorax="text before the tools"),
    _refused("parallel_tool_calls", CHAT, True, False),
    _refused("functions", CHAT, []),
    _refused("function_call", CHAT, "none", "auto"),
    _refused("audio", CHAT),
    _refused("modalities", CHAT, ["text"]),
    _refused("moderation", CHAT),
    _refused("prediction", CHAT),
    _refused("reasoning_effort", CHAT, "none"),
    _refused("service_tier", CHAT, "auto", "default"),
    _refused("store", CHAT, False),
    _refused("verbosity", CHAT, "medium"),
    _refused("web_search_options", CHAT),
)

ANSWERS = (
    (
        "id",
        "the string `null`",
        "`cmpl-` or `chatcmpl-` and 32 hex digits, the same in all events of a stream",
    ),
    ("object", "`text_completion`, also for chat", "OpenAI's"),
    ("created", "0; the time for a chat's whole answer", "the time"),
    ("model", "`null`, or the base model's id", "the adapter's id as it was asked for, or the base model's"),
    ("finish_reason", "a stop sequence is `content_filter`", "a stop sequence is `stop`"),
    ("logprobs", "null", "OpenAI's, of every generated token, where asked for; else null"),
    ("usage", "in every event of a completion's stream", "in a last event where `include_usage` asks for it"),
    ("system_fingerprint", "version, of chat only", "version of the server, then of the adapter or base"),
    ("delta", "the role in every event", "the role in the first event of each choice"),
    ("error", "422 in plain text for a wrong type", "LoRAX's `error` and `error_type`, always JSON"),
)


def rows(route: str) -> dict[str, Field]:
    """Name -> row, of one route."""
    return {field.name: field for field in FIELDS if route in field.routes}


def unknown_or_refused(name: str, route: str) -> str:
    """Why a field is not taken."""
    known = name in rows(route) or "." in name  # what is inside a known field
    return "is not implemented by this server" if known else "is not a field of this route"


def without_harmless(body: dict[str, Any], route: str) -> dict[str, Any]:
    """A body without nulls and without refused fields whose values ask for nothing."""
    table = rows(route)

    def asks(name: str, value: Any) -> bool:
        harmless = table[name].harmless if name in table else ()
        # 0 is not False here
        return value is not None and not any(value == none and type(value) is type(none) for none in harmless)

    return {name: value for name, value in body.items() if asks(name, value)}
