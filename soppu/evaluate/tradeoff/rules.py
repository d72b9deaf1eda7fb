"""The gate's rules on figures of arms: which of them a comparison breaks, and how that is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soppu.evaluate.tradeoff.schema import Arm, Tradeoff
from soppu.tradeoff_settings import Rule


def broken(found: Tradeoff, rules: Sequence[str]) -> list[str]:
    """A reason for each rule that does not hold, with the figure found and its limit.

    A rule on what was not measured does not hold: nothing is published on a figure that nobody has.

    Raises:
        ValueError: a text is no rule.
    """
    return [why for rule in map(Rule.parse, rules) if (why := _judged(rule, found))]


def _judged(rule: Rule, found: Tradeoff) -> str:
    arms = {arm.name: arm for arm in found.arms}
    values = {}
    for name in rule.arms:
        if name not in arms:
            return f"{_named(rule)}: arm {name!r} was not compared, only {', '.join(arms)}"
        value = getattr(arms[name], rule.figure)
        if value is None:
            return f"{_named(rule)}: {rule.figure} of {name} was not measured{_why(rule, found, arms[name])}"
        values[name] = float(value)
    return reason(rule, values)


def reason(rule: Rule, values: Mapping[str, float]) -> str:
    """Why a rule does not hold where its arms have these values of its figure; "" where it holds."""
    value = values[rule.arm]
    limit = rule.limit * values[rule.share_of] if rule.share_of else rule.limit
    if (value >= limit) if rule.at_least else (value <= limit):
        return ""
    words = "at least" if rule.at_least else "at most"
    of = f" ({rule.limit:g} of the {values[rule.share_of]:.6g} of {rule.share_of})" if rule.share_of else ""
    return f"{_named(rule)}: {rule.figure} of {rule.arm} is {value:.6g}, allowed: {words} {limit:.6g}{of}"


def _named(rule: Rule) -> str:
    return f"gate.rules: {rule.text!r}"


def _why(rule: Rule, found: Tradeoff, arm: Arm) -> str:
    reasons = {str(metric): why for metric, why in found.left_out.items()}
    if rule.figure in reasons:
        return f": {reasons[rule.figure]}"
    return f": an arm of kind {arm.kind} has none" if rule.figure == "relative_error" else ""
