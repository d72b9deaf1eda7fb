"""Rules of the gate on arms, for one user who joins: judged by their own losses, or waived by name."""

from __future__ import annotations

import pytest

from soppu import config as configuration
from soppu.config import Config
from soppu.errors import GateError
from soppu.evaluate.losses import UserLosses
from soppu.stages.join_rules import broken, heard

LOSS, OWN, TEXT = "loss of personal <= 0.9 of base", "loss of joint@16 <= 2.4", "bleu of joint@16 >= 1"
OTHER = "loss of residual@16 <= 2.4"


def configured(*rules: str) -> Config:
    values = {
        "gate": {"rules": list(rules)},
        "evaluate": {"arms": ["shared", "personal", "joint@16", "residual@16"]},
        "compress": {"method": "joint", "ratio": 16},
    }
    return configuration.from_dict(values)


def losses(**found: float) -> UserLosses:
    return UserLosses("dora", 4, **{"base": 3.0, "shared": 2.8, "personal": 2.0, "compressed": 2.0, **found})


def test_only_losses_of_the_arms_that_one_user_has_are_judged() -> None:
    config = configured(LOSS, OWN, TEXT, OTHER)
    with pytest.raises(GateError) as refused:
        heard(config, shared=True, waive=False)
    assert [reason.split(": ")[1] for reason in refused.value.reasons] == [repr(TEXT), repr(OTHER)]
    told = heard(config, shared=True, waive=True)
    assert told == {LOSS: "judged", OWN: "judged", TEXT: "waived", OTHER: "waived"}
    assert broken(losses(), config, told) == []


def test_a_shared_adapter_that_the_run_has_not_is_no_arm() -> None:
    config = configured("loss of personal <= 1 of shared")
    assert set(heard(config, shared=True, waive=False).values()) == {"judged"}
    with pytest.raises(GateError, match="only the loss of base, personal and of the run's own"):
        heard(config, shared=False, waive=False)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"personal": 2.8}, [f"gate.rules: {LOSS!r}: loss of personal is 2.8, allowed: at most 2.7 (0.9 of"]),
        ({"compressed": 2.5}, [f"gate.rules: {OWN!r}: loss of joint@16 is 2.5, allowed: at most 2.4"]),
        ({"compressed": 2.3, "shared": 2.2}, ["join: dora's core has 2.3000 nats", "the shared adapter 2.2"]),
        ({"compressed": float("nan")}, ["joint@16 is nan", "join: dora's core has nan"]),
    ],
)
def test_what_is_broken_says_value_and_limit(found: dict[str, float], said: list[str]) -> None:
    config = configured(LOSS, OWN)
    reasons = "; ".join(broken(losses(**found), config, heard(config, shared=True, waive=False)))
    assert reasons and all(text in reasons for text in said)
