"""What a user who joins is judged by beside the gate's limits: simpler arms, and the gate's rules on arms.

Such a rule speaks of means over users, and no arms are compared for one who joins. Their own held-out losses
judge the rules on the loss of arms that they have; of the other rules they have no figure.
"""

from __future__ import annotations

from collections.abc import Mapping

from soppu.config import METHODS, Config
from soppu.errors import GateError
from soppu.evaluate.losses import TOLERANCE, UserLosses
from soppu.evaluate.tradeoff import rules
from soppu.tradeoff_settings import BASE, PERSONAL, SHARED, Rule, parse_arm

JUDGED, WAIVED = "judged", "waived"
_FIGURE = "loss"


def heard(config: Config, *, shared: bool, waive: bool) -> dict[str, str]:
    """Rule -> whether the newcomer is judged by it, or it is waived.

    Args:
        shared: whether the run has a shared adapter.
        waive: whether rules that one user alone has no figure of are let be.

    Raises:
        GateError: there are such rules, and they are not waived; a reason for each.
    """
    columns = {rule.text: _columns(rule, config) for rule in map(Rule.parse, config.gate.rules)}
    there = {"base", "personal", "compressed", *(["shared"] if shared else [])}
    without = [text for text, found in columns.items() if not found or not there.issuperset(found.values())]
    if without and not waive:
        raise GateError([f"gate.rules: {text!r}: {_why(shared)}" for text in without])
    return {text: WAIVED if text in without else JUDGED for text in columns}


def broken(losses: UserLosses, config: Config, told: Mapping[str, str]) -> list[str]:
    """A reason for each rule that the newcomer's losses break, and one where a simpler arm is better.

    Args:
        told: what `heard` has given; rules that are waived there are let be.
    """
    judged = [rule for rule in map(Rule.parse, config.gate.rules) if told[rule.text] == JUDGED]
    found = []
    for rule in judged:
        values = {arm: getattr(losses, column) for arm, column in _columns(rule, config).items()}
        found.append(rules.reason(rule, values))
    return [why for why in (*found, _worse(losses)) if why]


def _columns(rule: Rule, config: Config) -> dict[str, str]:
    """Arm -> its column of `UserLosses`; {} where the rule is on something else."""
    own = (config.compress.method, config.compress.ratio)
    known = {BASE: "base", SHARED: "shared", PERSONAL: "personal"}
    known |= {arm: "compressed" for arm in config.evaluate.arms if parse_arm(arm, METHODS) == own}
    fits = rule.figure == _FIGURE and all(arm in known for arm in rule.arms)
    return {arm: known[arm] for arm in rule.arms} if fits else {}


def _why(shared: bool) -> str:
    arms = ", ".join((BASE, *([SHARED] if shared else []), PERSONAL))
    return (
        f"one user who joins has no such figure, only the {_FIGURE} of {arms} and of the run's own"
        " compression; --waive-rules joins without this rule, `soppu run` with the user's text compares"
        " the arms"
    )


def _worse(losses: UserLosses) -> str:
    """Why a core is of no use that is worse than a simpler arm; "" where it is not."""
    arms = {"the base model": losses.base}
    if losses.shared is not None:
        arms["the shared adapter"] = losses.shared
    name = min(arms, key=arms.__getitem__)
    if losses.compressed <= arms[name] + TOLERANCE:
        return ""
    return (
        f"join: {losses.user}'s core has {losses.compressed:.4f} nats a token on held-out text, {name}"
        f" {arms[name]:.4f}; allowed: {TOLERANCE} more"
    )
