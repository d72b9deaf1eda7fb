"""What adapter_config.json says about finished LoRA weights, by PEFT's own rules.

Without importing peft, which takes seconds: a test holds the names below against its `LoraConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from soppu.errors import AdapterError

Value = TypeVar("Value")
Names = str | list[str] | None
Rank = Annotated[int, Field(ge=1)]

# They say how weights were trained, or matter only beside a switch that is looked at by itself.
HARMLESS = frozenset(
    "task_type auto_mapping peft_version revision inference_mode lora_dropout runtime_config"
    " loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size".split()
)
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights
_OFF: tuple[Any, ...] = (None, False, "", "none", [], {})


class LoraFields(BaseModel):
    """The keys that say what the weights mean, with PEFT's defaults; all others are kept as extras."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: Any = True
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names = None

    @field_validator("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _compiles(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(rf"(.*\.)?({text})$")
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from None
        return value

    def rank(self, module: str) -> int:
        """The rank that PEFT gives to a module."""
        return _first(self.rank_pattern, module, self.r)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by at a rank: r, or sqrt(r) for rsLoRA."""
        return math.sqrt(rank) if self.use_rslora else rank

    def scale(self, module: str) -> float:
        """The factor on B @ A of a module."""
        return _first(self.alpha_pattern, module, self.lora_alpha) / self.divisor(self.rank(module))

    def targets(self, module: str) -> bool:
        """Whether PEFT would load tensors of this module; it drops others without an error."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if not _names(self.target_modules, module):
            return False
        layers = self.layers_to_transform
        if isinstance(self.target_modules, str) or layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        heads = [rf"(?:^|.*?\.){pattern}" for pattern in patterns or ()] or [r".*?\.[^.]*"]
        found = next((match for head in heads if (match := re.match(rf"{head}\.(\d+)\.", module))), None)
        # the last group: a pattern may bring groups of its own
        return found is not None and int(found[found.re.groups]) in (
            [layers] if isinstance(layers, int) else layers
        )

    def more_than_plain(self) -> list[str]:
        """Every key that makes the adapter more than B @ A on the base weights, or that nobody knows."""
        faults = [
            f"{name}={value!r}"
            for name, value in (self.model_extra or {}).items()
            if name not in HARMLESS and not _is_in(value, _OFF)
        ]
        if not _is_in(self.init_lora_weights, _INITS):
            faults.append(f"init_lora_weights={self.init_lora_weights!r}")
        return sorted(faults)


def parse(config: Mapping[str, Any], *, who: str) -> LoraFields:
    """Check the content of an adapter_config.json.

    Raises:
        AdapterError: a value of the wrong type, another method, or a feature that is more than LoRA.
    """
    try:
        fields = LoraFields.model_validate(dict(config))
    except ValidationError as error:
        faults = {
            item["loc"][0]: f"{item['loc'][0]} {item['input']!r}: {item['msg']}" for item in error.errors()
        }
        raise AdapterError(
            f"{who}: {'; '.join(faults.values())}; only the LoRA adapters of PEFT are read: write the folder"
            " again with PEFT's save_pretrained, or mend the value"
        ) from None
    if features := fields.more_than_plain():
        raise AdapterError(
            f"{who}: not a plain LoRA adapter: {', '.join(features)}; train without it (an initialisation"
            " changing the base: save with PEFT's path_initial_model_for_weight_conversion); a key of a newer"
            " PEFT that only concerns training can be removed from the file"
        )
    return fields


def _first(patterns: Mapping[str, Value] | None, module: str, default: Value) -> Value:
    """The value of the first pattern that fits, as PEFT's `get_pattern_key` chooses."""
    fits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)


def _names(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Membership by type and value: 1 is not True, 0 is not False."""
    return any(type(value) is type(item) and value == item for item in allowed)
