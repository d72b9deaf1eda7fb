from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu.compress import CompressOptions
from soppu.compress.options import Target, ratio
from soppu.errors import ConfigError


def test_no_target_is_false_and_has_no_words():
    assert not Target() and str(Target()) == "" and Target().most_bytes(1000) == 0


@pytest.mark.parametrize(
    ("target", "words", "most"),
    [
        (Target(ratio=16), "16x", 125),
        (Target(ratio=2.5), "2.5x", 800),
        (Target(max_bytes=777), "777 bytes", 777),
        (Target(max_error=0.05), "relative error 0.05 for every user", 0),
    ],
)
def test_a_target_is_true_says_itself_and_knows_its_bytes(target, words, most):
    assert target and str(target) == words and target.most_bytes(1000) == most


@given(st.integers(1, 10**9), st.floats(1, 100))
def test_a_file_of_the_bytes_allowed_reaches_the_ratio(parameters, asked):
    allowed = Target(ratio=asked).most_bytes(parameters)
    out_of_reach = ratio(parameters, 1) < asked  # then one byte, which no file is small enough for
    assert allowed == 1 if out_of_reach else ratio(parameters, allowed) >= asked * (1 - 1e-12)
    assert ratio(parameters, allowed + 1) < asked


@pytest.mark.parametrize(
    "given",
    [{"ratio": 2, "max_bytes": 5}, {"ratio": 2, "max_error": 0.1}, {"max_bytes": 5, "max_error": 0.1}],
)
def test_two_targets_are_refused_by_name(given):
    for kind in (Target, CompressOptions):
        with pytest.raises(ConfigError, match=" and ".join(given)):
            kind(**given)


@pytest.mark.parametrize("name", ["ratio", "max_bytes", "max_error"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "2", True, [1]])
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ConfigError) as caught:
        Target(**{name: value})
    assert f"compress.{name} = {value!r}, allowed" in str(caught.value)


def test_an_error_of_1_or_more_is_refused():
    for value in (1, 1.0, 5):
        with pytest.raises(ConfigError, match="max_error = .*below 1"):
            Target(max_error=value)
