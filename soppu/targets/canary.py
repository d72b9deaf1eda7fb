"""Judging one canary answer: is it from the adapter that was asked for, and does that adapter do anything?

Not for sending requests; every target does that in its own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from soppu.serve.names import header_value

_ROUNDING = 0.5  # more than rounding changes a logprob: bfloat16 logits from 16 on are 0.125 apart
Trace = tuple[tuple[int, float], ...]  # (token id, logprob) of every generated token


@dataclass(frozen=True)
class CanaryResult:
    """One user's canary: `reason` says what was wrong, "" if nothing was."""

    user: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Answered:
    """What came back: `refusal` is the error, "" where there was an answer."""

    refusal: str = ""
    adapter_id: str = ""
    version: str = ""
    trace: Trace = ()
    text: str = ""


def fault(answer: Answered, user: str, version: str, *, base_trace: Trace | None) -> str:
    """What is wrong with an answer that `user` was asked for in a version of the bundle, "" if nothing.

    `base_trace` is the base model's for the same prompt; None for users whose adapter is empty.
    """
    adapter_id = f"{user}@{version}"
    if answer.refusal:
        return answer.refusal
    if answer.adapter_id != header_value(adapter_id) or answer.version != version:
        return (
            f"asked for {adapter_id!r} of {version!r}, served by {answer.adapter_id!r} of {answer.version!r}"
        )
    if not answer.trace:
        return "no tokens came back"
    if not all(math.isfinite(logprob) for _, logprob in answer.trace):
        return f"logprobs are not finite: {answer.trace}"
    if answer.trace == base_trace:
        return "the answer is the base model's: the adapter has no effect"
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
