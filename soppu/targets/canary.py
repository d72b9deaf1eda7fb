"""Canaries: what came back from a server, and what is wrong with it. Asking is `targets.http`'s."""

from __future__ import annotations

import math
from dataclasses import dataclass

from soppu.serve.names import header_value

_ROUNDING = 0.5  # more than rounding changes a logprob: bfloat16 logits from 16 on are 0.125 apart
Trace = tuple[tuple[int, float], ...]  # (token id, logprob) of every generated token


@dataclass(frozen=True)
class Answered:
    """What came back: `refusal` is the error, "" where there was an answer."""

    refusal: str = ""
    adapter_id: str = ""
    version: str = ""
    trace: Trace = ()
    text: str = ""


@dataclass(frozen=True)
class Due:
    """What an answer is held against."""

    adapter_id: str  # asked for
    version: str  # of the bundle, as the server tells it
    base_trace: Trace | None = None  # the base model's answer; None for users whose adapter is empty
    expected: Trace | None = None  # the adapter's answer elsewhere; None where nobody has asked it


def fault(answer: Answered, due: Due) -> str:
    """What is wrong with an answer, "" if nothing."""
    if answer.refusal:
        return answer.refusal
    if answer.adapter_id != header_value(due.adapter_id) or answer.version != due.version:
        return (
            f"asked for {due.adapter_id!r} of {due.version!r}, served by {answer.adapter_id!r} of"
            f" {answer.version!r}"
        )
    if not answer.trace:
        return "no tokens came back"
    if not all(math.isfinite(logprob) for _, logprob in answer.trace):
        return f"logprobs are not finite: {answer.trace}"
    if answer.trace == due.base_trace:
        return "the answer is the base model's: the adapter has no effect"
    if due.expected is not None and not is_close(answer.trace, due.expected):
        tokens, wanted = ([token for token, _ in trace] for trace in (answer.trace, due.expected))
        return f"tokens {tokens}, the adapter gives {wanted} here; logprobs may differ by {_ROUNDING}"
    return ""


def is_close(trace: Trace, other: Trace) -> bool:
    """Whether two traces differ by no more than rounding may: logprobs nearly equal as long as tokens are.

    Where two tokens are nearly as probable, rounding decides; what comes after that says nothing.
    """
    for (token, logprob), (other_token, other_logprob) in zip(trace, other, strict=False):
        if abs(logprob - other_logprob) >= _ROUNDING:
            return False
        if token != other_token:
            return True
    return len(trace) == len(other)
