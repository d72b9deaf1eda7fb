"""Cases of a test beyond those that `make test` has time for: `make test-long` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*cases: Any) -> list[Any]:
    """Cases of one parameter; or of several, each a tuple."""
    return [pytest.param(*_values(case), marks=pytest.mark.long) for case in cases]


def some(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All of these, of which `make test` runs the ones named."""
    return [case if case in quick else thorough(case)[0] for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
