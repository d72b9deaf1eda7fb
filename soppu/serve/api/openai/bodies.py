"""OpenAI's request bodies: which fields they have, of which types. What is asked with them: `openai.asked`.

Ranges are judged by `soppu.serve.api.requests`, for all routes alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soppu.errors import RequestError
from soppu.serve.api.openai.fields import BOTH, unknown_or_refused, without_harmless
from soppu.serve.api.requests import Encodable, Json
from soppu.serve.refusals import invalid

B = TypeVar("B", bound="Body")
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Kind:
    """What a field has to be, in the words of its refusal."""

    words: str


_Text = Annotated[Encodable | None, Kind("a string of valid Unicode")]
_Flag = Annotated[bool | None, Kind("true or false")]
_Number = Annotated[float | None, Field(gt=-1e30, lt=1e30), Kind("a number")]
_Whole = Annotated[int | None, Field(ge=0, lt=2**64), Kind("a whole number between 0 and 2^64 - 1")]
_Top = Annotated[
    int | None, Field(ge=0, le=MAX_LOGPROBS), Kind(f"a whole number between 0 and {MAX_LOGPROBS}")
]
_Count = Annotated[int | None, Field(ge=1, lt=2**31), Kind("a whole number of at least 1")]
_Texts = Annotated[Encodable | list[Encodable] | None, Kind("a string or a list of strings")]
_Object = Annotated[dict[str, Any] | None, Kind("an object")]


class _Part(BaseModel):
    """A part of a message: its text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: Encodable


class _Strict(BaseModel):
    """An object of which no key is ignored; null is as if the key were not there."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class Message(_Strict):
    """One message of a conversation."""

    role: Annotated[Encodable, Kind("a string")] = Field(description="Who speaks; the chat template decides")
    content: Annotated[Encodable | list[_Part], Kind("a string or a list of parts of type text")] = Field(
        description="The text, or parts of it that are put together as they are"
    )
    name: _Text = Field(None, description="The speaker's name, for templates that show it")

    def as_dict(self) -> Json:
        """What a chat template reads."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class StreamOptions(_Strict):
    """What a stream holds beside its text."""

    include_usage: _Flag = Field(None, description="A last event with the counts of tokens")
    include_obfuscation: Annotated[Literal[False] | None, Kind("false: nothing is obfuscated here")] = Field(
        None, description="OpenAI's padding of events, which this server does not do"
    )


class Body(BaseModel):
    """The fields that both routes have."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ROUTE: ClassVar[str]

    model: Annotated[Encodable, Kind("a string of valid Unicode")] = Field(
        description='Adapter id, as "alice" or "alice@<bundle id>"; "" or the base model\'s id is the base'
    )
    max_tokens: _Whole = Field(None, description="At most so many new tokens; absent: all that fits")
    temperature: _Number = Field(None, description="0 takes the likeliest token; else divides the logits")
    top_p: _Number = Field(None, description="The smallest set of tokens of this probability, 0 < p <= 1")
    n: _Count = Field(None, description="Choices for each prompt; where given, they are sampled")
    stream: _Flag = Field(None, description="Answer with server-sent events")
    stream_options: Annotated[StreamOptions | None, Kind("an object")] = Field(
        None, description="Only with `stream`"
    )
    stop: _Texts = Field(None, description="Up to 4 texts that end the answer and are not part of it")
    seed: _Whole = Field(None, description="Makes sampling repeat itself; choice i has `seed` + i")
    presence_penalty: _Number = Field(None, description="Subtracted from a token's logit once it appeared")
    frequency_penalty: _Number = Field(None, description="Subtracted as often as a token appeared")
    repetition_penalty: _Number = Field(None, description="Divides the logits of tokens that appeared")
    top_k: _Whole = Field(None, description="Only the k likeliest tokens")
    ignore_eos_token: _Flag = Field(None, description="Go on after the end-of-text token")
    adapter_source: _Text = Field(None, description="local: nothing is fetched from elsewhere")
    api_token: _Text = Field(None, description="LoRAX's token of a hub; nothing is fetched here")
    user: Any = Field(None, description="The caller's own note; says nothing about the answer")

    @model_validator(mode="before")
    @classmethod
    def _asked_for(cls, value: Any) -> Any:
        return without_harmless(value, cls.ROUTE)


class CompletionBody(Body):
    """`POST /v1/completions`."""

    ROUTE: ClassVar[str] = BOTH[0]

    prompt: Annotated[Encodable | list[Encodable], Kind("a string or a list of strings (no token ids)")] = (
        Field(description="The text to go on with; of a list, each")
    )
    best_of: _Count = Field(None, description="Generate so many and answer with the `n` likeliest")
    echo: _Flag = Field(None, description="The prompt comes first in the text")
    logprobs: _Top = Field(None, description="Logprobs of the tokens, and of so many others at each")


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    ROUTE: ClassVar[str] = BOTH[1]

    messages: Annotated[list[Message], Kind("a list of messages")] = Field(
        description="The conversation, for the tokenizer's chat template"
    )
    max_completion_tokens: _Whole = Field(None, description="Another name of `max_tokens`")
    logprobs: _Flag = Field(None, description="Logprobs of the tokens")
    top_logprobs: _Top = Field(None, description="With `logprobs`: also of so many others at each")
    response_format: _Object = Field(
        None, description='{"type": "text" | "json_object" | "json_schema", "json_schema": {"schema": ...}}'
    )
    guideline: _Text = Field(None, description="LoRAX's: a variable of the chat template")
    metadata: Any = Field(None, description="The caller's own notes; say nothing about the answer")
    safety_identifier: Any = Field(None, description="Likewise")
    prompt_cache_key: Any = Field(None, description="A hint for OpenAI's caches; likewise")
    prompt_cache_options: Any = Field(None, description="Likewise")
    prompt_cache_retention: Any = Field(None, description="Likewise")


def read_body(kind: type[B], body: Json) -> B:
    """A body of a route. RequestError 422 `validation` naming the field, what it has to be, and the value."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, kind, body) from None


def _refusal(error: ValidationError, kind: type[Body], body: Json) -> RequestError:
    """The first fault pydantic found, in our words."""
    fault = error.errors(include_url=False, include_context=False)[0]
    path, words, value = _walk(kind, fault["loc"], body)
    if fault["type"] == "missing":
        return invalid(f"missing field `{path}`")
    given = f"Given: {json.dumps(value)[:80]}"
    if fault["type"] == "extra_forbidden":
        name = path[:80].encode(errors="backslashreplace").decode()  # a caller's own word
        return invalid(f"`{name}` {unknown_or_refused(path, kind.ROUTE)}. {given}")
    return invalid(f"`{path}` must be {words}. {given}")


_NESTED: dict[str, type[BaseModel]] = {"messages": Message, "stream_options": StreamOptions}


def _walk(kind: type[BaseModel], loc: Sequence[int | str], value: Any) -> tuple[str, str, Any]:
    """The innermost field of ours on the way to a fault: its path, what it has to be, and its value."""
    path, words = "", "an object"
    for step in loc:
        if isinstance(step, int):
            path, value, words = f"{path}[{step}]", value[step], "an object"
            continue
        path = f"{path}.{step}" if path else step
        value = value.get(step) if isinstance(value, dict) else value
        field = kind.model_fields.get(step)
        if field is None:  # not a field of ours
            return path, words, value
        words = next((item.words for item in field.metadata if isinstance(item, Kind)), words)
        if step not in _NESTED:  # deeper are the alternatives of a union
            return path, words, value
        kind = _NESTED[step]
    return path, words, value
