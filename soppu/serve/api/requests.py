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

Json = dict[str, Any]
MAX_STOP_SEQUENCES = 4
_MAX_BODY = 2 << 20  # LoRAX's limit
_GREEDY_BELOW = 1e-5  # temperatures below this one overflow fp32 scores
_PENALTIES = (1e-3, 1e3)
_NO_NULL = ("stop", "ignore_eos_token", "do_sample", "details")
# Parameters this server does not implement, and the values that ask for nothing; None always does.
_UNUSED: dict[str, tuple[object, ...]] = {
    "merged_adapters": (),
    "best_of": (1,),
    "typical_p": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "return_k_alternatives": (0,),
    "response_format": (),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "apply_chat_template": (False,),
}


def _strictly_positive(value: int, info: ValidationInfo) -> int:
    if value == 0:
        raise invalid(f"`{info.field_name}` must be strictly positive")
    return value


def _encodable(value: str) -> str:
    value.encode()  # a lone surrogate raises a ValueError here, later it would break the tokenizer
    return value


# Messages name a type by its description.
_Text = Annotated[str, AfterValidator(_encodable), Field(description="a string of valid Unicode")]
_Flag = Annotated[bool, Field(description="true or false")]
_Number = Annotated[float, Field(gt=-1e30, lt=1e30, description="a number")]
_Whole = Annotated[int, Field(ge=0, lt=2**64, description="a whole number between 0 and 2^64 - 1")]
_Positive = Annotated[_Whole, AfterValidator(_strictly_positive)]


class Parameters(BaseModel, strict=True):
    """LoRAX's parameters that mean something here, in its order of checking; 0, -1 and "" are "not given"."""

    adapter_id: _Text = ""
    api_token: _Text = ""  # LoRAX forwards it to hubs; nothing is fetched here
    max_new_tokens: _Positive = 0
    stop: Annotated[list[_Text], Field(description="a list of strings")] = []
    truncate: _Positive = 0
    ignore_eos_token: _Flag = False
    temperature: _Number = 1.0
    repetition_penalty: _Number = 1.0
    top_p: _Number = 1.0
    top_k: _Positive = 0
    seed: _Whole = -1
    do_sample: _Flag = False
    details: _Flag = False
    return_full_text: _Flag = False
    adapter_source: Annotated[_Text, StringConstraints(to_lower=True)] = ""

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

    Raises:
        RequestError: 422 `validation`, naming the parameter, the limit and the value; 424 for an
            `adapter_source` other than local.
    """
    try:
        read = _Body.model_validate(body if stream is None else {**body, "stream": stream})
    except ValidationError as error:
        raise _refusal(error, body) from None
    if not read.inputs:
        raise invalid("`inputs` cannot be empty")
    parameters = read.parameters
    check_name(parameters.adapter_id, what="adapter_id")
    _refuse_unused(body.get("parameters", {}), has_adapter=bool(parameters.adapter_id))
    check_source(parameters.adapter_source, adapter_id=parameters.adapter_id)
    generation = GenerationRequest(
        inputs=read.inputs,
        adapter_id=parameters.adapter_id,
        max_new_tokens=parameters.max_new_tokens or None,
        stop=_stop(parameters.stop),
        truncate=parameters.truncate or None,
        ignore_eos=parameters.ignore_eos_token,
        sampling=_sampling(parameters),
    )
    return ParsedRequest(generation, parameters, read.stream)


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


def _refuse_unused(parameters: Json, *, has_adapter: bool) -> None:
    if parameters.get("merged_adapters") is not None and has_adapter:
        raise invalid("at most one of `adapter_id` or `adapters` may be provided")
    for name, harmless in _UNUSED.items():
        value = parameters.get(name)
        wrong_kind = isinstance(value, bool) and not any(isinstance(item, bool) for item in harmless)
        if value is not None and (wrong_kind or value not in harmless):
            raise invalid(f"`{name}` is not implemented by this server. Given: {json.dumps(value)[:80]}")


def _stop(stop: list[str]) -> tuple[str, ...]:
    if len(stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stop)}")
    if "" in stop:
        raise invalid("`stop` holds an empty string")
    return tuple(stop)


def _sampling(parameters: Parameters) -> Sampling:
    temperature, top_p = parameters.temperature, parameters.top_p
    penalty, (least, most) = parameters.repetition_penalty, _PENALTIES
    if temperature < 0:
        raise invalid(f"`temperature` must be non-negative. Given: {temperature}")
    if not least <= penalty <= most:
        raise invalid(f"`repetition_penalty` must be >= {least} and <= {most}. Given: {penalty}")
    if not 0 < top_p <= 1:
        raise invalid(f"`top_p` must be > 0.0 and <= 1.0. Given: {top_p}")
    greedy = temperature < _GREEDY_BELOW
    warped = temperature != 1.0 or parameters.top_k > 0 or top_p < 1.0
    return Sampling(
        do_sample=(parameters.do_sample or warped) and not greedy,
        temperature=1.0 if greedy else temperature,
        top_k=parameters.top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        seed=None if parameters.seed < 0 else parameters.seed,
    )
