"""The made-up fleets of the compression tests, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from soppu import adapter
from tests.soppu.compress.conftest import factors, fleet

__all__ = ["factors", "fleet", "folders"]


@pytest.fixture
def folders(fleet, tmp_path: Path) -> list[str]:
    """Five adapters as PEFT folders of their own: user0 to user4."""
    for user, made in fleet((2, 2, 1, 2, 2)).items():
        adapter.write(made, tmp_path / "users" / user)
    return [str(tmp_path / "users" / f"user{n}") for n in range(5)]
