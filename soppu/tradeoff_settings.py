"""Settings of the comparison of arms: what is compared, by which figures, and the gate's rules on them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator

from soppu.settings import Count, Texts, settings

Metric = Literal["loss", "bleu", "chrf", "codebleu", "exact_match", "valid", "pass_at_1"]
METRICS: tuple[str, ...] = get_args(Metric)
USUAL = tuple(name for name in METRICS if name != "pass_at_1")  # which takes minutes an arm, so it is named
COSTS = (
    "latency_ms_p50",
    "latency_ms_p99",
    "first_token_ms_p50",
    "tokens_s",
    "memory_bytes",
    "bytes",
    "bytes_per_user",
    "relative_error",
)
FIGURES = (*METRICS, *COSTS)
BASE, SHARED, PERSONAL, CENTRALISED = "base", "shared", "personal", "centralised"
PLAIN = (BASE, SHARED, PERSONAL, CENTRALISED)
_COMPRESSED = re.compile(r"([a-z-]+)@(\d+(?:\.\d+)?)")
_RULE = re.compile(r"(\w+) of (\S+) (>=|<=) (\d+(?:\.\d+)?)(?: of (\S+))?")


def parse_arm(name: str, methods: Collection[str]) -> tuple[str, float] | None:
    """(method, ratio) of METHOD@RATIO, None for the other arms. ValueError where it is neither."""
    if name in PLAIN:
        return None
    found = _COMPRESSED.fullmatch(name)
    if not found or found[1] not in methods or not float(found[2]):
        raise ValueError(
            f"arm {name!r}, allowed: {', '.join(PLAIN)}, or METHOD@RATIO as residual@16, with a RATIO above 0"
            f" and a METHOD of {', '.join(methods)}"
        )
    return found[1], float(found[2])


@dataclass(frozen=True)
class Rule:
    """A limit on a figure of one arm, by itself or as a share of another arm's."""

    text: str
    figure: str
    arm: str
    at_least: bool  # else at most
    limit: float
    share_of: str = ""  # the other arm; "" where the limit is the figure itself

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of `bleu of residual@16 >= 0.9 of personal`, or without the end. ValueError says what is wrong."""
        found = _RULE.fullmatch(text)
        if not found:
            raise ValueError(
                f"gate.rules: {text!r}, allowed: FIGURE of ARM >= NUMBER, or <=, with 'of ARM' behind the"
                " NUMBER where it is a share of that arm's, as 'bleu of residual@16 >= 0.9 of personal'"
            )
        if found[1] not in FIGURES:
            raise ValueError(f"gate.rules: {text!r}: figure {found[1]!r}, allowed: {', '.join(FIGURES)}")
        return cls(text, found[1], found[2], found[3] == ">=", float(found[4]), found[5] or "")

    @property
    def arms(self) -> tuple[str, ...]:
        """Those that have to be measured."""
        return (self.arm, self.share_of) if self.share_of else (self.arm,)


@settings("evaluate")
class EvaluateConfig:
    """What `soppu evaluate` compares; the flows do so where `arms` names any."""

    arms: Texts = ()
    metrics: Texts = ()
    prompts: Count = 8
    max_new_tokens: Annotated[Count, Field(le=4096)] = 48
    batch: Count = 8
    problems: Annotated[Count, Field(le=164)] = 164  # of HumanEval, where metrics name pass_at_1

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if unknown := [name for name in value if name not in METRICS]:
            raise ValueError(f"evaluate.metrics: {unknown[0]!r}, allowed: {', '.join(METRICS)}")
        return value

    def check(self, methods: Collection[str], rules: Collection[str]) -> None:
        """Arms are what there can be, and rules speak of arms that are measured. ValueError."""
        for name in self.arms:
            try:
                parse_arm(name, methods)
            except ValueError as error:
                raise ValueError(f"evaluate.arms: {error}") from None
        measured = (BASE, *self.arms)
        for rule in map(Rule.parse, rules):
            if unknown := [name for name in rule.arms if name not in measured]:
                raise ValueError(
                    f"gate.rules: {rule.text!r}: arm {unknown[0]!r}, allowed: {', '.join(measured)}, which"
                    " evaluate.arms has measured"
                )
            metrics = self.metrics or USUAL
            if rule.figure in METRICS and rule.figure not in metrics:
                raise ValueError(
                    f"gate.rules: {rule.text!r}: {rule.figure} is not in evaluate.metrics, allowed:"
                    f" {', '.join(metrics)}"
                )


def check_rules(value: tuple[str, ...]) -> tuple[str, ...]:
    """For the field that holds rules: each of them reads as one. ValueError."""
    for text in value:
        Rule.parse(text)
    return value
