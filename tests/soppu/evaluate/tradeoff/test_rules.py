"""Rules of the gate on figures of arms: how they read, and what breaks them."""

from __future__ import annotations

import pytest

from soppu import config as configuration
from soppu.errors import ConfigError
from soppu.evaluate.tradeoff import schema
from soppu.evaluate.tradeoff.rules import broken
from tests.soppu.evaluate.tradeoff.example import comparison

FOUND = schema.check(comparison(), source="x")  # bleu 10 and 20, loss 2.0 and 1.5


@pytest.mark.parametrize(
    "rule",
    [
        "bleu of residual@16 >= 20",
        "bleu of residual@16 >= 2 of base",
        "loss of residual@16 <= 0.75 of base",
        "latency_ms_p50 of base <= 100",
    ],
)
def test_a_rule_holds_at_its_limit(rule: str) -> None:
    assert broken(FOUND, [rule]) == []


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("bleu of residual@16 >= 20.5", "bleu of residual@16 is 20, allowed: at least 20.5"),
        ("bleu of residual@16 >= 2.1 of base", "is 20, allowed: at least 21 (2.1 of the 10 of base)"),
        ("loss of base <= 1.9", "loss of base is 2, allowed: at most 1.9"),
        ("codebleu of base >= 1", "codebleu of base was not measured: not asked for"),
        ("relative_error of base <= 1", "was not measured: an arm of kind base has none"),
        ("bleu of joint@16 >= 1", "arm 'joint@16' was not compared, only base, residual@16"),
    ],
)
def test_a_broken_rule_says_rule_value_and_limit(rule: str, said: str) -> None:
    (reason,) = broken(FOUND, ["loss of base <= 5", rule])
    assert reason.startswith(f"gate.rules: {rule!r}: ") and said in reason


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["bleu is good"], "'bleu is good', allowed: FIGURE of ARM >= NUMBER"),
        (["rouge of base >= 1"], "figure 'rouge', allowed: loss, bleu, "),
        (["bleu of joint@16 >= 1"], "arm 'joint@16', allowed: base, residual@16"),
        (["bleu of residual@16 >= 0.9 of personal"], "arm 'personal', allowed: base, residual@16"),
        (["chrf of base >= 1"], "chrf is not in evaluate.metrics, allowed: loss, bleu"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_refused_as_it_is_read(rules: list[str], said: str) -> None:
    values = {"gate": {"rules": rules}, "evaluate": {"arms": ["residual@16"], "metrics": ["loss", "bleu"]}}
    with pytest.raises(ConfigError) as refused:
        configuration.from_dict(values)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("metrics", "refused"), [([], True), (["loss"], True), (["loss", "pass_at_1"], False)]
)
def test_a_rule_on_pass_at_1_needs_it_to_be_named(metrics: list[str], refused: bool) -> None:
    values = {"gate": {"rules": ["pass_at_1 of base >= 0.1"]}, "evaluate": {"metrics": metrics}}
    if refused:
        with pytest.raises(ConfigError, match="pass_at_1 is not in evaluate.metrics, allowed: loss"):
            configuration.from_dict(values)
    else:
        assert configuration.from_dict(values).evaluate.problems == 164


@pytest.mark.parametrize("arm", ["zip@16", "residual@0", "residual", "residual@x", "joint@16@16"])
def test_an_arm_that_there_is_not_is_refused_as_it_is_read(arm: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.arms: arm .* allowed: base, shared, personal"):
        configuration.from_dict({"evaluate": {"arms": [arm]}})
