"""LoRAX's request JSON: parsing and validation. Answers are built in `soppu.serve.api.responses`.

Unknown keys are ignored, as LoRAX does. A parameter this server does not implement is accepted at its default
and refused by name otherwise, never ignored. Faults LoRAX's extractor reports as plain text are reported in
its JSON error form here, with the same status. pydantic checks types; the messages are ours.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, model_validator
from pydantic.types import StringConstraints
from pydantic_core import from_json
from starlette.requests import Request

from soppu.errors import RequestError
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.sampling import Sampling
from soppu.serve.names import check_name, check_source
from soppu.serve.refusals import invalid
from soppu.serve.router.deciding import Decision

Json = dict[str, Any]
MAX_STOP_SEQUENCES = 4
_MAX_BODY = 2 << 20  # LoRAX's limit
_GREEDY_BELOW = 1e-5  # temperatures below this one overflow fp32 scores
_PENALTIES = (1e-3, 1e3)
_MERGES = ("linear", "ties", "dare_linear", "dare_ties")
_SIGNS = ("total", "frequency")
_FORMATS = ("text", "json_object", "json_schema")
_ANY_OBJECT = '{"type": "object"}'
_MOST_ALTERNATIVES = 20  # each is decoded for each token, while the other rows wait
_NO_NULL = ("stop", "ignore_eos_token", "do_sample", "details")
_SAMPLING = ("temperature", "top_k", "top_p", "typical_p")  # giving one of these asks for sampling

# What this server does with each of LoRAX's parameters; the documentation's table is made of it.
PARAMETERS: dict[str, str] = {
    "adapter_id": "honoured; a user, a single adapter, or either with a version as in `alice@0f3c`",
    "adapter_source": "accepted; beside an `adapter_id` only `local`, else a 424: nothing is fetched",
    "merged_adapters": "refused with 422 unless null; a wrong strategy, which ends LoRAX, is named",
    "api_token": "accepted; nothing is fetched from a hub",
    "best_of": "honoured up to `max_best_of`; the texts are always sampled; by the model's own logprobs",
    "temperature": "honoured; 0 takes the likeliest token",
    "repetition_penalty": "honoured from 0.001 to 1000",
    "frequency_penalty": "honoured as OpenAI defines it, over generated tokens; LoRAX's counts the prompt",
    "presence_penalty": "honoured as OpenAI defines it, over generated tokens; LoRAX's counts the prompt",
    "top_k": "honoured",
    "top_p": "honoured",
    "typical_p": "honoured",
    "do_sample": "honoured",
    "max_new_tokens": "honoured",
    "ignore_eos_token": "honoured; a text held to a `response_format` ends all the same",
    "return_full_text": "honoured",
    "stop": "honoured, up to 4; the text ends with the stop sequence itself, special tokens' names count",
    "truncate": "honoured",
    "watermark": "refused with 422 unless false",
    "details": "honoured",
    "decoder_input_details": "honoured; not with a stream, as in LoRAX",
    "return_k_alternatives": "honoured up to 20; by the model's own logprobs",
    "apply_chat_template": "refused with 422 unless false; `/v1/chat/completions` applies it",
    "seed": "honoured; not with `best_of`, as in LoRAX",
    "response_format": "honoured; a schema that cannot be followed is refused; `text` holds to nothing",
}


def _strictly_positive(value: int, info: ValidationInfo) -> int:
    if value == 0:
        raise invalid(f"`{info.field_name}` must be strictly positive")
    return value


def _not_set(value: object, info: ValidationInfo) -> object:
    if value:
        raise invalid(f"`{info.field_name}` is not implemented by this server. Given: true")
    return value


def _encodable(value: str) -> str:
    value.encode()  # a lone surrogate raises a ValueError here, later it would break the tokenizer
    return value


Encodable = Annotated[str, AfterValidator(_encodable)]
# Messages name a type by its description.
_Text = Annotated[Encodable, Field(description="a string of valid Unicode")]
_Flag = Annotated[bool, Field(description="true or false")]
_Number = Annotated[float, Field(gt=-1e30, lt=1e30, description="a number")]
_Whole = Annotated[int, Field(ge=0, lt=2**64, description="a whole number between 0 and 2^64 - 1")]
_Positive = Annotated[_Whole, AfterValidator(_strictly_positive)]
_Object = Annotated[Json, Field(description="an object")]
_Unset = Annotated[bool, Field(description="true or false"), AfterValidator(_not_set)]


class Parameters(BaseModel, strict=True):
    """LoRAX's parameters that mean something here, in its order of checking; 0, -1 and "" are "not given"."""

    adapter_id: _Text = ""
    api_token: _Text = ""  # LoRAX forwards it to hubs; nothing is fetched here
    max_new_tokens: _Positive = 0
    stop: Annotated[list[_Text], Field(description="a list of strings")] = []
    truncate: _Positive = 0
    ignore_eos_token: _Flag = False
    best_of: _Positive = 1
    temperature: _Number = 1.0
    repetition_penalty: _Number = 1.0
    frequency_penalty: _Number = 0.0
    presence_penalty: _Number = 0.0
    top_p: _Number = 1.0
    typical_p: _Number = 1.0
    top_k: _Positive = 0
    return_k_alternatives: _Positive = 0
    seed: _Whole = -1
    do_sample: _Flag = False
    details: _Flag = False
    return_full_text: _Flag = False
    adapter_source: Annotated[_Text, StringConstraints(to_lower=True)] = ""
    decoder_input_details: _Flag = False
    response_format: _Object = {}
    merged_adapters: _Object = {}
    watermark: _Unset = False
    apply_chat_template: _Unset = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in _NO_NULL}


class _Body(BaseModel, strict=True):
    inputs: _Text
    parameters: Annotated[Parameters, Field(description="an object")] = Parameters()
    stream: _Flag = False


@dataclass(frozen=True)
class ParsedRequest:
    """A generation request, the parameters it was read from, and whether its answer is a stream."""

    generation: GenerationRequest
    parameters: Parameters
    stream: bool
    decision: Decision | None = None  # of the server's router, where it has one

    @property
    def details(self) -> bool:
        """True where the answer tells of its tokens; those of the prompt are told of with the others."""
        return self.parameters.details or self.generation.prefill_details


async def body_chunks(request: Request, *, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. RequestError 413 where it has more than `limit` bytes."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise RequestError(
                f"the body must have at most {limit} bytes", status=413, error_type="bad_request"
            )
        yield chunk


async def read_json(request: Request) -> Json:
    """The body as an object. RequestError 415, 413, and as `parse_json`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"Expected request with `Content-Type: application/json`. Given: {kind or 'none'}",
            status=415,
            error_type="bad_request",
        )
    return parse_json(b"".join([chunk async for chunk in body_chunks(request, limit=_MAX_BODY)]))


def parse_json(body: bytes) -> Json:
    """The body as an object. RequestError 400 where it is not JSON, 422 where it is not an object."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(
            f"Failed to parse the request body as JSON: {error}", status=400, error_type="bad_request"
        ) from None
    if not isinstance(value, dict):
        raise invalid(f"the body must be an object. Given: {type(value).__name__}")
    return value


def parse_request(body: Json, *, stream: bool | None = None) -> ParsedRequest:
    """Validate a body by LoRAX's rules.

    Args:
        stream: what the route decides; None reads the body's `stream`, as `POST /` does.

    `prompt` is another name of `inputs`.

    Raises:
        RequestError: 422 `validation`, naming the parameter, the limit and the value; 424 for an
            `adapter_source` other than local.
    """
    body = _with_inputs(body)
    try:
        read = _Body.model_validate(body if stream is None else {**body, "stream": stream})
    except ValidationError as error:
        raise _refusal(error, body) from None
    if not read.inputs:
        raise invalid("`inputs` cannot be empty")
    parameters = read.parameters
    check_name(parameters.adapter_id, what="adapter_id")
    _refuse_merged(parameters)
    check_source(parameters.adapter_source, adapter_id=parameters.adapter_id)
    generation = GenerationRequest(
        inputs=read.inputs,
        adapter_id=parameters.adapter_id,
        max_new_tokens=parameters.max_new_tokens or None,
        stop=_stop(parameters.stop),
        truncate=parameters.truncate or None,
        ignore_eos=parameters.ignore_eos_token,
        sampling=_sampling(parameters),
        best_of=_best_of(parameters, stream=read.stream),
        alternatives=_alternatives(parameters.return_k_alternatives),
        prefill_details=parameters.decoder_input_details,
        schema=_schema(parameters),
    )
    if read.stream and generation.prefill_details:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")
    return ParsedRequest(generation, parameters, read.stream)


def _with_inputs(body: Json) -> Json:
    """The body with its `prompt` as `inputs`. RequestError 422 where it has both: which is meant?"""
    if "prompt" not in body:
        return body
    if "inputs" in body:
        raise invalid("at most one of `inputs` or `prompt`, which is another name of it, may be provided")
    return {"inputs" if name == "prompt" else name: value for name, value in body.items()}


def _refusal(error: ValidationError, body: Json) -> RequestError:
    """The first fault pydantic found, in words that name the field, its kind and the value."""
    fault = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in fault["loc"][:2]]  # what is deeper is an item of `stop`
    if fault["type"] == "missing":
        return invalid(f"missing field `{path[-1]}`")
    model: type[BaseModel] = Parameters if path[1:] else _Body
    value = body
    for part in path:
        value = value[part]
    kind = model.model_fields[path[-1]].description
    return invalid(f"`{'.'.join(path)}` must be {kind}. Given: {json.dumps(value)[:80]}")


def _refuse_merged(parameters: Parameters) -> None:
    """Refuse merged adapters: first for what LoRAX refuses, or ends of, then for themselves."""
    if "merged_adapters" not in parameters.model_fields_set:
        return
    merged = parameters.merged_adapters
    if parameters.adapter_id:
        raise invalid("at most one of `adapter_id` or `adapters` may be provided")
    ids, weights = merged.get("ids"), merged.get("weights", [])
    if not isinstance(ids, list) or not isinstance(weights, list):
        raise invalid("`merged_adapters` must hold a list `ids` and a list `weights`")
    if not ids:
        raise invalid("at least one adapter ID must be provided when setting `adapters`")
    if len(ids) != len(weights):
        raise invalid("number of adapter IDs must match number of adapter weights")
    for name, allowed in (("merge_strategy", _MERGES), ("majority_sign_method", _SIGNS)):
        if (value := merged.get(name)) is not None:
            _one_of(value, allowed, name=f"merged_adapters.{name}")
    raise invalid(f"`merged_adapters` is not implemented by this server. Given: {json.dumps(merged)[:80]}")


def _one_of(value: object, allowed: tuple[str, ...], *, name: str) -> None:
    if value not in allowed:
        raise invalid(f"`{name}` must be one of {', '.join(allowed)}. Given: {json.dumps(value)[:80]}")


def _best_of(parameters: Parameters, *, stream: bool) -> int:
    if parameters.best_of > 1:
        if not _samples(parameters) or _is_greedy(parameters):
            raise invalid("you must use sampling when `best_of` is > 1")
        if parameters.seed >= 0:
            raise invalid("`seed` must not be set when `best_of` > 1")
        if stream:
            raise invalid("`best_of` != 1 is not supported when streaming tokens")
    return parameters.best_of


def _samples(parameters: Parameters) -> bool:
    """True where LoRAX takes a request for one that samples; it then may not, with `temperature` 1."""
    return parameters.do_sample or not parameters.model_fields_set.isdisjoint(_SAMPLING)


def _is_greedy(parameters: Parameters) -> bool:
    return parameters.temperature < _GREEDY_BELOW


def _alternatives(count: int) -> int:
    if count > _MOST_ALTERNATIVES:
        raise invalid(f"`return_k_alternatives` must be <= {_MOST_ALTERNATIVES}. Given: {count}")
    return count


def _schema(parameters: Parameters) -> str | None:
    """The JSON schema a text is held to, as JSON; None where it may be any text."""
    if "response_format" not in parameters.model_fields_set:
        return None
    wanted = parameters.response_format
    if "type" not in wanted:
        raise invalid("missing field `response_format.type`")
    _one_of(wanted["type"], _FORMATS, name="response_format.type")
    schema = wanted.get("schema")
    if wanted["type"] == "text":
        if schema is not None:
            raise invalid("`response_format.schema` needs the type json_schema or json_object. Given: text")
        return None
    if schema is None:
        return _ANY_OBJECT
    if not isinstance(schema, dict):
        raise invalid(f"`response_format.schema` must be an object. Given: {json.dumps(schema)[:80]}")
    return json.dumps(schema)


def _stop(stop: list[str]) -> tuple[str, ...]:
    if len(stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stop)}")
    if "" in stop:
        raise invalid("`stop` holds an empty string")
    return tuple(stop)


def _sampling(parameters: Parameters) -> Sampling:
    temperature, top_p, typical_p = parameters.temperature, parameters.top_p, parameters.typical_p
    penalty, (least, most) = parameters.repetition_penalty, _PENALTIES
    if temperature < 0:
        raise invalid(f"`temperature` must be non-negative. Given: {temperature}")
    if not least <= penalty <= most:
        raise invalid(f"`repetition_penalty` must be >= {least} and <= {most}. Given: {penalty}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= (value := getattr(parameters, name)) <= 2:
            raise invalid(f"`{name}` must be >= -2.0 and <= 2.0. Given: {value}")
    if not 0 < top_p <= 1:
        raise invalid(f"`top_p` must be > 0.0 and <= 1.0. Given: {top_p}")
    if "typical_p" in parameters.model_fields_set and not 0 < typical_p < 1:
        raise invalid(f"`typical_p` must be > 0.0 and < 1.0. Given: {typical_p}")
    greedy = _is_greedy(parameters)
    warped = temperature != 1.0 or parameters.top_k > 0 or top_p < 1.0 or typical_p < 1.0
    return Sampling(
        do_sample=(parameters.do_sample or warped or parameters.best_of > 1) and not greedy,
        temperature=1.0 if greedy else temperature,
        top_k=parameters.top_k,
        top_p=top_p,
        typical_p=typical_p,
        repetition_penalty=penalty,
        frequency_penalty=parameters.frequency_penalty,
        presence_penalty=parameters.presence_penalty,
        seed=None if parameters.seed < 0 else parameters.seed,
    )
