"""The shape of tradeoff.json, and the check of one against it. `docs/evaluate.md` says what fields mean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soppu.errors import ReportError
from soppu.evaluate.gate import Text
from soppu.files import read_object
from soppu.settings import Amount, Count, Flag, Natural, Real, faults
from soppu.tradeoff_settings import Metric

FILE = "tradeoff.json"  # the newest; each is also kept as tradeoff-<key>.json
PAGE = "tradeoff.html"  # beside it, for people
LOWER_IS_BETTER = frozenset({"loss"})
_SHOWN = 20  # faults spelt out; of more, the number is told

Kind = Literal["base", "adapter", "bundle", "centralised"]
Percent = Annotated[Real, Field(ge=0, le=100 + 1e-9)]  # BLEU and its like are sums of floats
Share = Annotated[Real, Field(ge=0, le=1)]


class _Part(BaseModel):
    """An object of the file. Every field is always there, and no other is."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True)


class Difference(_Part):
    """What an arm wins over another one, above 0 is better, with its 95 % interval."""

    over: Text
    mean: Real
    low: Real | None
    high: Real | None


class RowDifference(Difference):
    """The same of one user, over their prompts."""

    metric: Metric


class Environment(_Part):
    """Where it was measured, and with what."""

    hardware: Text
    python: Text
    torch: Text
    transformers: Text
    packages: dict[Text, Text]  # name -> version, of what the metrics are computed with
    device: Text
    dtype: Text
    threads: Count
    seed: Natural
    base_model: Text
    base_hash: Text


class Generation(_Part):
    """How text was generated: a user's prompt is the beginning of a held-out example."""

    greedy: Flag
    max_new_tokens: Count
    batch: Count
    stop: list[Text]
    seed: Natural
    prompts_per_user: Count
    timed_prompts: Count  # of those, how many of a user are asked alone, for the latency
    timed_tokens: Count  # new tokens in each of those answers
    problems: Natural = 0  # of HumanEval, that every arm completed; not in a file of before it could be asked


class _Scores(_Part):
    loss: Real | None  # nats a token of held-out text
    bleu: Percent | None
    chrf: Percent | None
    codebleu: Percent | None
    exact_match: Share | None
    valid: Share | None
    latency_ms_p50: Amount | None
    latency_ms_p99: Amount | None


class Arm(_Scores):
    """One way to serve everybody: means over users. A metric that is not there is null."""

    name: Text
    kind: Kind
    method: Text | None
    target: Amount | None  # the ratio that was asked for
    bundle_id: Text | None
    bytes: Natural  # on disk, of all users; 0 for the base model itself
    bytes_per_user: Amount
    relative_error: Amount | None
    memory_bytes: Natural | None  # the most that generating took, of the process or of the GPU
    pass_at_1: Share | None
    first_token_ms_p50: Amount | None
    tokens_s: Amount | None  # of all rows of a batch together
    intervals: dict[Metric, Difference]


class Row(_Scores):
    """One user with one arm."""

    user: Text
    arm: Text
    bytes: Amount  # their part of what the arm has on disk
    interval: RowDifference | None


class Tradeoff(_Part):
    """All of it."""

    format: Literal[1]
    run: Text
    created: Text
    soppu: Text
    environment: Environment
    generation: Generation
    arms: Annotated[list[Arm], Field(min_length=1)]
    left_out: dict[Metric, Text]
    rows: list[Row]
    texts: Text  # the file of texts beside it

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        names = [arm.name for arm in self.arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"arms: {twice[0]!r} twice, allowed: once")
        pairs = [(row.user, row.arm) for row in self.rows]
        if twice_over := [pair for pair, count in Counter(pairs).items() if count > 1]:
            user, arm = twice_over[0]
            raise ValueError(f"rows: user {user!r} with arm {arm!r} twice, allowed: once")
        if unknown := sorted({arm for _, arm in pairs}.difference(names)):
            raise ValueError(f"rows: arm = {unknown[0]!r}, allowed: {', '.join(names)}")
        return self


class TextLine(_Part):
    """One prompt, and what every arm made of it."""

    user: Text
    prompt: Text
    reference: Text
    texts: dict[Text, Text]  # arm -> what it generated
    losses: dict[Text, Real]  # arm -> nats a token of the reference


def check(value: object, *, source: str) -> Tradeoff:
    """The comparison that JSON values are.

    Args:
        source: file named in the message.

    Raises:
        ReportError: fields missing, unknown or of another type, all of them (up to 20), numbers that are not
            finite, or another format number.
    """
    if not isinstance(value, dict):
        raise ReportError(f"{source}: found {value!r:.60}, allowed: an object")
    return _checked(Tradeoff, value, source)


def check_line(value: object, *, source: str) -> TextLine:
    """One line of the file of texts. Raises ReportError as `check`."""
    if not isinstance(value, dict):
        raise ReportError(f"{source}: found {value!r:.60}, allowed: an object")
    return _checked(TextLine, value, source)


def read(path: Path) -> Tradeoff:
    """Read and check a stored comparison. ReportError if it is none; OSError if it is absent."""
    found = read_object(path, error=ReportError, cure="`soppu evaluate RUN_DIR` writes it anew")
    return check(found, source=str(path))


def _checked(kind: type[Any], value: dict[str, Any], source: str) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = list(faults(error, of=kind))
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ReportError("\n".join(f"{source}: {line}" for line in lines[:_SHOWN] + more)) from None
