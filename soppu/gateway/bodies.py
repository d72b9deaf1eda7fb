"""What a body may hold: every field of either API by its name and kind, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soppu.gateway.reading import Json
from soppu.gateway.refusals import Refused

MOST = 2**63 - 1
Flag = bool | None
Number = Annotated[float, Field(gt=-1e30, lt=1e30)] | None
Natural = Annotated[int, Field(ge=0, le=MOST)] | None
Positive = Annotated[int, Field(ge=1, le=MOST)] | None
Seed = Annotated[int, Field(ge=0, lt=2**64)] | None
Few = Annotated[int, Field(ge=0, le=100)] | None
Word = Annotated[str, Field(max_length=64, pattern=r"^[\w .:-]*$")]
Stops = Annotated[list[str], Field(max_length=16)]
Local = Literal["", "local"] | None
Nothing = Literal[""] | None  # a token for somewhere else


class Closed(BaseModel):
    """An object of which no key is passed over; null is as if the key were not there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Format(Closed):
    """What an answer is held to, in LoRAX's form and in OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Json | None = Field(None, alias="schema")
    json_schema: Json | None = None


class Parameters(Closed):
    """LoRAX's parameters, without the names of adapters."""

    adapter_source: Local = None
    api_token: Nothing = None
    merged_adapters: None = None
    best_of: Positive = None
    temperature: Number = None
    repetition_penalty: Number = None
    frequency_penalty: Number = None
    presence_penalty: Number = None
    top_k: Natural = None
    top_p: Number = None
    typical_p: Number = None
    do_sample: Flag = None
    max_new_tokens: Positive = None
    ignore_eos_token: Flag = None
    return_full_text: Flag = None
    stop: Stops | None = None
    truncate: Positive = None
    watermark: Flag = None
    details: Flag = None
    decoder_input_details: Flag = None
    return_k_alternatives: Few = None
    apply_chat_template: Flag = None
    seed: Seed = None
    response_format: Format | None = None


class LoraxBody(Closed):
    """`POST /`, `/generate` and `/generate_stream`."""

    inputs: str
    parameters: Parameters = Parameters()
    stream: Flag = None


class StreamOptions(Closed):
    """What a stream holds beside its text."""

    include_usage: Flag = None
    include_obfuscation: Literal[False] | None = None


class Part(Closed):
    """A part of a message: its text; no images, which a server would fetch."""

    type: Literal["text"]
    text: str


class Message(Closed):
    """One message of a conversation."""

    role: Word
    content: str | Annotated[list[Part], Field(max_length=1000)]
    name: Annotated[str, Field(max_length=128)] | None = None


class OpenAi(Closed):
    """The fields that both of OpenAI's routes have, without the model."""

    max_tokens: Positive = None
    temperature: Number = None
    top_p: Number = None
    n: Positive = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    stop: str | Stops | None = None
    seed: Seed = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    repetition_penalty: Number = None
    top_k: Natural = None
    ignore_eos_token: Flag = None
    adapter_source: Local = None
    api_token: Nothing = None
    user: Any = None  # the caller's own notes, these and those of the chat: they go no further


class CompletionBody(OpenAi):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1000)]
    best_of: Positive = None
    echo: Flag = None
    logprobs: Few = None


class ChatBody(OpenAi):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Positive = None
    logprobs: Flag = None
    top_logprobs: Few = None
    response_format: Format | None = None
    guideline: str | None = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


NOTES = frozenset(
    (
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )
)
_WRITTEN_HERE = frozenset(("adapter_source", "api_token", "merged_adapters"))


def read(kind: type[Closed], body: Json) -> Json:
    """The fields of a body that are sent on, as they were given. Refused: 422, naming the field."""
    try:
        return _plain(kind.model_validate(body))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part)[:40].encode(errors="backslashreplace").decode() for part in fault["loc"][:4])
    if fault["type"] == "extra_forbidden":
        raise Refused(422, f"`{path}` is not taken here")
    raise Refused(422, f"`{path or 'the body'}`: {fault['msg']}")


def _plain(body: Closed) -> Json:
    sent = body.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)
    for held in (sent, sent.get("parameters", {})):
        for name in (NOTES | _WRITTEN_HERE) & held.keys():
            del held[name]
    return sent
