"""LoRAX's request JSON: parsing and validation. Answers are built in `soppu.serve.api.responses`.

Unknown keys are ignored, as LoRAX does. A parameter this server does not implement is accepted at its default
and refused by name otherwise, never ignored. Faults LoRAX's extractor reports as plain text are reported in
its JSON error form here, with the same status.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from soppu.errors import RequestError
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.sampling import Sampling
from soppu.serve.names import check_name
from soppu.serve.refusals import failed, invalid

T = TypeVar("T")
Json = dict[str, Any]
MAX_STOP_SEQUENCES = 4
_GREEDY_BELOW = 1e-5  # temperatures below this one overflow fp32 scores
_PENALTIES = (1e-3, 1e3)
ADAPTER_SOURCES = ("hub", "local", "s3", "pbase")
# Values of what this server does not implement that ask for nothing; None is always among them.
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


@dataclass(frozen=True)
class ParsedRequest:
    """A generation request with what concerns only the answer's form."""

    generation: GenerationRequest
    details: bool = False
    full_text: bool = False
    stream: bool = False
    adapter_source: str = ""


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """A JSON type: how a message calls it, and how a value is read (None where it is not one)."""

    name: str
    read: Callable[[object], T | None]


class _Fields:
    """Typed reading of one JSON object; every fault is a 422 that names the field."""

    def __init__(self, values: Json, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str, kind: _Kind[T], default: T, *, nullable: bool = True) -> T:
        """The field, or `default` where it is absent (or null, if that is allowed)."""
        if name not in self._values:
            return default
        value = self._values[name]
        if value is None and nullable:
            return default
        parsed = kind.read(value)
        if parsed is None:
            shown = json.dumps(value)[:80]
            raise invalid(f"`{self._prefix}{name}` must be {kind.name}. Given: {shown}")
        return parsed


def parse_json(body: bytes) -> Json:
    """The body as an object. RequestError 400 where it is not JSON, 422 where it is not an object."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(
            f"Failed to parse the request body as JSON: {why}", status=400, error_type="bad_request"
        ) from None
    if not isinstance(value, dict):
        raise invalid(f"the body must be an object. Given: {type(value).__name__}")
    return value


def parse_request(body: Json, *, stream: bool | None = None) -> ParsedRequest:
    """Validate a body by LoRAX's rules.

    Args:
        stream: what the route decides; None reads the body's `stream`, as `POST /` does.

    Raises:
        RequestError: 422 `validation`, naming the parameter, the limit and the value; 424 for an unknown
            `adapter_source`.
    """
    top = _Fields(body)
    if "inputs" not in body:
        raise invalid("missing field `inputs`")
    inputs = top.get("inputs", _STRING, "", nullable=False)
    if not inputs:
        raise invalid("`inputs` cannot be empty")
    parameters = top.get("parameters", _OBJECT, {}, nullable=False)
    fields = _Fields(parameters, "parameters.")
    adapter_id = _adapter_id(fields)
    _refuse_unused(parameters, has_adapter=bool(adapter_id))
    fields.get("api_token", _STRING, "")  # LoRAX forwards it to hubs; nothing is fetched here
    generation = GenerationRequest(
        inputs=inputs,
        adapter_id=adapter_id,
        max_new_tokens=_positive(fields, "max_new_tokens"),
        stop=_stop(fields),
        truncate=_positive(fields, "truncate"),
        ignore_eos=fields.get("ignore_eos_token", _BOOLEAN, False, nullable=False),
        sampling=_sampling(fields),
    )
    return ParsedRequest(
        generation,
        details=fields.get("details", _BOOLEAN, False, nullable=False),
        full_text=fields.get("return_full_text", _BOOLEAN, False),
        stream=top.get("stream", _BOOLEAN, False, nullable=False) if stream is None else stream,
        adapter_source=_adapter_source(fields, adapter_id),
    )


def _adapter_id(fields: _Fields) -> str:
    adapter_id = fields.get("adapter_id", _STRING, "")
    check_name(adapter_id, what="adapter_id")
    return adapter_id


def _adapter_source(fields: _Fields, adapter_id: str) -> str:
    source = fields.get("adapter_source", _STRING, "").lower()
    if source and source not in ADAPTER_SOURCES:
        raise failed(f"Invalid source {source!r} when downloading adapter {adapter_id!r}")
    return source


def _refuse_unused(parameters: Json, *, has_adapter: bool) -> None:
    if parameters.get("merged_adapters") is not None and has_adapter:
        raise invalid("at most one of `adapter_id` or `adapters` may be provided")
    for name, harmless in _UNUSED.items():
        value = parameters.get(name)
        wrong_kind = isinstance(value, bool) and not any(isinstance(item, bool) for item in harmless)
        if value is not None and (wrong_kind or value not in harmless):
            raise invalid(f"`{name}` is not implemented by this server. Given: {json.dumps(value)[:80]}")


def _stop(fields: _Fields) -> tuple[str, ...]:
    stop = fields.get("stop", _STRINGS, [], nullable=False)
    if len(stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stop)}")
    if "" in stop:
        raise invalid("`stop` holds an empty string")
    return tuple(stop)


def _positive(fields: _Fields, name: str) -> int | None:
    value = fields.get(name, _INTEGER, -1)
    if value == 0:
        raise invalid(f"`{name}` must be strictly positive")
    return None if value < 0 else value


def _sampling(fields: _Fields) -> Sampling:
    temperature = fields.get("temperature", _NUMBER, 1.0)
    penalty = fields.get("repetition_penalty", _NUMBER, 1.0)
    top_p = fields.get("top_p", _NUMBER, 1.0)
    top_k = fields.get("top_k", _INTEGER, -1)
    seed = fields.get("seed", _INTEGER, -1)
    if temperature < 0:
        raise invalid(f"`temperature` must be non-negative. Given: {temperature}")
    if not _PENALTIES[0] <= penalty <= _PENALTIES[1]:
        raise invalid(
            f"`repetition_penalty` must be >= {_PENALTIES[0]} and <= {_PENALTIES[1]}. Given: {penalty}"
        )
    if not 0 < top_p <= 1:
        raise invalid(f"`top_p` must be > 0.0 and <= 1.0. Given: {top_p}")
    if top_k == 0:
        raise invalid("`top_k` must be strictly positive")
    asked = fields.get("do_sample", _BOOLEAN, False, nullable=False)
    greedy = temperature < _GREEDY_BELOW
    warped = temperature != 1.0 or top_k > 0 or top_p < 1.0
    return Sampling(
        do_sample=(asked or warped) and not greedy,
        temperature=1.0 if greedy else temperature,
        top_k=max(top_k, 0),
        top_p=top_p,
        repetition_penalty=penalty,
        seed=None if seed < 0 else seed,
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_string(value: object) -> str | None:
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        return None
    return value


def _read_strings(value: object) -> list[str] | None:
    if not isinstance(value, list) or any(_read_string(item) is None for item in value):
        return None
    return value


def _read_integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 2**64 else None


def _read_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e30 else None


_STRING = _Kind("a string of valid Unicode", _read_string)
_STRINGS = _Kind("a list of strings", _read_strings)
_OBJECT = _Kind[Json]("an object", lambda value: value if isinstance(value, dict) else None)
_BOOLEAN = _Kind[bool]("true or false", lambda value: value if isinstance(value, bool) else None)
_INTEGER = _Kind("a whole number between 0 and 2^64 - 1", _read_integer)
_NUMBER = _Kind("a number", _read_number)
