"""Settings: frozen dataclasses that check their values. pydantic finds what is wrong, this file words it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, GetPydanticSchema, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema

from soppu.errors import ConfigError

_T = TypeVar("_T")
_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "dataclass_type": "a table",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "{expected}",
    "allowed": "{expected}",
}


def allowed(words: str) -> GetPydanticSchema:
    """Says in words what a field may hold, for what pydantic has none."""
    context = {"expected": words}
    return GetPydanticSchema(
        lambda kind, handler: core_schema.custom_error_schema(
            handler(kind), "allowed", custom_error_message=words, custom_error_context=context
        )
    )


Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), allowed("auto, cpu, cuda or cuda:N")
]  # what soppu.devices resolves
# true is not 1 and "1" is not 1; an integer is a fine way to write a float
Whole = Annotated[int, Strict()]
Real = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]  # what TOML holds, and torch takes
Amount = Annotated[Real, Field(ge=0)]
Texts = Annotated[tuple[str, ...], allowed("a list of texts")]


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(section: str) -> Callable[[type[_T]], type[_T]]:
    """A frozen dataclass of the keys of a section. However it is made, ConfigError lists what is wrong."""

    def decorate(cls: type[_T]) -> type[_T]:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        made: Any = dataclass(frozen=True, config=config)(cls)
        check = made.__init__

        def __init__(self: Any, *args: Any, **values: Any) -> None:
            try:
                check(self, *args, **values)
            except ValidationError as error:
                lines = faults(error, of=made, prefix=section and f"{section}.")
                raise ConfigError("; ".join(lines)) from None

        made.__init__ = __init__
        return made

    return decorate


def build(cls: type[_T], values: Mapping[str, Any], *, source: str) -> _T:
    """An object of nested mappings. Raises ConfigError with a line for every fault, each led by `source`."""
    try:
        return cls.__pydantic_validator__.validate_python(dict(values))  # type: ignore[attr-defined]
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in faults(error, of=cls))) from None


def faults(error: ValidationError, *, of: Any, prefix: str = "") -> Iterator[str]:
    """A line for everything wrong with a value of the type `of`: key, value found, values allowed."""
    for fault in error.errors(include_url=False):
        kind, steps, value, context = fault["type"], fault["loc"], repr(fault["input"]), fault.get("ctx", {})
        key = _key(prefix, steps)
        if kind == "unexpected_keyword_argument":
            yield _unknown(of, steps, prefix)
        elif kind == "missing":
            yield f"{key}: missing"
        elif kind == "extra_forbidden":
            yield f"{key}: unknown, and nothing else is allowed there"
        elif kind == "value_error":  # ours, of values that do not go together
            yield str(context["error"])
        else:
            if kind == "literal_error":
                context["expected"] = context["expected"].replace(" or ", ", ").replace("'", "")
            words = _ALLOWED.get(kind, fault["msg"]).format(**context)
            yield f"{key} = {value if len(value) <= 60 else f'{value[:57]}...'}, allowed: {words}"


def _key(prefix: str, steps: tuple[int | str, ...]) -> str:
    return prefix + "".join(
        f".{step}" if str(step).isidentifier() else f"[{step!r}]" for step in steps
    ).removeprefix(".")


def _unknown(of: Any, steps: tuple[int | str, ...], prefix: str) -> str:
    *sections, name = map(str, steps)
    for section in sections:
        of, prefix = of.__pydantic_fields__[section].annotation, f"{prefix}{section}."
    known = list(of.__pydantic_fields__)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {prefix}{name}; {prefix or 'top level'} knows: {', '.join(known)}{hint}"


def toml(values: Mapping[str, Any]) -> str:
    """TOML text of plain values and tables of them."""
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables]
    for table, entries in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in entries.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # TOML knows no surrogate pairs, which JSON's \u escapes would give, and no bare DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
