"""How near generated text comes to what a user wrote: BLEU, chrF, CodeBLEU, exact match, valid syntax.

Scores are those of the field's own libraries, corpus level, one corpus a user; both come with the extra
`evaluate`. Pure: texts in, numbers out.
"""

from __future__ import annotations

import ast
import codeop
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from soppu.errors import MissingExtra

EXTRA = "evaluate"
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "codebleu": "codebleu"}
CODE_ONLY = ("codebleu", "valid")
TEXT_METRICS = ("bleu", "chrf", "codebleu", "exact_match", "valid")
# Below these, of the best arm, a score says that the model cannot do it, not which arm does it better.
# Of 164 problems one is 0.006, so three solved tell no two arms apart.
ABOUT_ZERO = {**dict.fromkeys(NEEDS, 0.5), "exact_match": 0.005, "valid": 0.005, "pass_at_1": 0.02}


@dataclass(frozen=True)
class Said:
    """One prompt, what its user wrote next, and what an arm made of it."""

    prompt: str
    reference: str
    text: str


def score(metric: str, said: Sequence[Said]) -> float:
    """One figure of one user's texts: 0 to 100 for BLEU, chrF and CodeBLEU, else a share.

    Raises:
        MissingExtra: its library is not installed.
        KeyError: no such metric.
    """
    return _SCORES[metric](said)


def missing(metric: str) -> MissingExtra | None:
    """Why a metric cannot be computed here."""
    package = NEEDS.get(metric, "")
    if not package or importlib.util.find_spec(package) is not None:
        return None
    return MissingExtra(f"metric {metric}", package=package, extra=EXTRA)


def is_function(prompt: str, completion: str) -> bool:
    """Whether a prompt is the head of a Python function and the completion its body."""
    try:
        with _quiet():
            tree = ast.parse(prompt + completion)
    except (SyntaxError, ValueError):
        return False
    return bool(tree.body) and isinstance(tree.body[-1], ast.FunctionDef | ast.AsyncFunctionDef)


def parses(prompt: str, text: str) -> bool:
    """Whether a text goes on with its prompt as Python does, as far as its whole lines go.

    A text may be cut short, so the beginning of something longer counts; nothing at all does not.
    """
    whole = text[: text.rfind("\n") + 1] or text
    try:
        with _quiet():
            codeop.compile_command(prompt + whole, symbol="exec")  # None where more has to follow
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return bool(whole.strip())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of invalid escapes in what somebody wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _library(metric: str) -> Any:
    if why := missing(metric):
        raise why
    return importlib.import_module(NEEDS[metric])


def _bleu(said: Sequence[Said]) -> float:
    hypotheses, references = _columns(said)
    return float(_library("bleu").corpus_bleu(hypotheses, [references]).score)


def _chrf(said: Sequence[Said]) -> float:
    hypotheses, references = _columns(said)
    return float(_library("chrf").corpus_chrf(hypotheses, [references]).score)


def _codebleu(said: Sequence[Said]) -> float:
    hypotheses, references = _columns(said)
    library, root = _library("codebleu"), logging.getLogger()
    root.addFilter(_no_data_flow)
    try:
        found = library.calc_codebleu([[one] for one in references], hypotheses, "python")
    finally:
        root.removeFilter(_no_data_flow)
    return 100.0 * float(found["codebleu"])


def _no_data_flow(record: logging.LogRecord) -> bool:
    """Said at every call where short references have no data flow, for which it counts 1; see the docs."""
    return "data-flow" not in record.getMessage()


def _columns(said: Sequence[Said]) -> tuple[list[str], list[str]]:
    return [one.text for one in said], [one.reference for one in said]


def _exact(said: Sequence[Said]) -> float:
    return sum(one.text.rstrip() == one.reference.rstrip() for one in said) / len(said)


def _valid(said: Sequence[Said]) -> float:
    return sum(parses(one.prompt, one.text) for one in said) / len(said)


_SCORES: dict[str, Callable[[Sequence[Said]], float]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "codebleu": _codebleu,
    "exact_match": _exact,
    "valid": _valid,
}
