"""Scores of texts are the libraries' own; what counts as Python."""

from __future__ import annotations

import logging

import codebleu
import pytest
import sacrebleu

from soppu.errors import MissingExtra
from soppu.evaluate.tradeoff import texts
from soppu.evaluate.tradeoff.texts import Said, is_function, missing, parses, score

SAID = [
    Said("def f(x):\n", "    y = x + 1\n    return y\n", "    y = x + 2\n    return y\n"),
    Said("def g(x):\n", "    return x * 2 if x else None\n", "```\n\nThis function doubles x.\n"),
    Said("def h(x):\n", "    raise ValueError(x)\n", "    raise ValueError(x)\n"),
]
GIVEN, WRITTEN = [one.text for one in SAID], [one.reference for one in SAID]


def test_scores_are_the_libraries_own() -> None:
    whole = codebleu.calc_codebleu([[one] for one in WRITTEN], GIVEN, lang="python")["codebleu"]
    assert score("bleu", SAID) == sacrebleu.corpus_bleu(GIVEN, [WRITTEN]).score
    assert score("chrf", SAID) == sacrebleu.corpus_chrf(GIVEN, [WRITTEN]).score
    assert score("codebleu", SAID) == pytest.approx(100 * whole, rel=1e-12)
    assert 0 < score("bleu", SAID) < 100 and 0 < score("codebleu", SAID) < 100


def test_a_text_as_it_was_written_scores_all_there_is() -> None:
    same = [Said(one.prompt, one.reference, one.reference) for one in SAID]
    found = {metric: score(metric, same) for metric in texts.TEXT_METRICS}
    assert found.pop("codebleu") > 95  # what is shorter than four words counts less than all
    assert found == pytest.approx({"bleu": 100, "chrf": 100, "exact_match": 1, "valid": 1})


def test_exact_match_and_valid_are_shares() -> None:
    assert (score("exact_match", SAID), score("valid", SAID)) == pytest.approx((1 / 3, 2 / 3))


def test_codebleu_is_quiet_of_data_flow_and_silences_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    score("codebleu", SAID[2:])
    logging.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("    return x\n", True),
        ("    return x\n    y = (1 +", True),  # cut within a line, which does not count
        ("    if x:\n", True),  # more has to follow
        ("    call(x,\n", True),
        ("", False),
        ("return x\n", False),  # not indented
        ("    return x)\n", False),
        ("```\n\nThis function\n", False),
        ("    x = '\0'\n", False),
    ],
)
def test_what_is_valid_is_told_by_whole_lines(text: str, valid: bool) -> None:
    assert parses("def f(x):\n", text) is valid


def test_a_function_is_a_head_and_a_body() -> None:
    assert is_function('async def f(x):\n    """Say."""\n', "    return x\n")
    assert not is_function("say 3: ", "ann says 3 ann says 3 ")
    assert not is_function("x = 1\n", "y = 2\n")  # Python, but no function
    assert not is_function("hello", "")


def test_a_library_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.NEEDS, "bleu", "no_such_package")
    assert "soppu[evaluate]" in str(missing("bleu"))
    with pytest.raises(MissingExtra, match="no_such_package"):
        score("bleu", SAID)
    assert missing("valid") is None
