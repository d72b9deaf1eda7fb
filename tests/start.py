"""No search for garbage while tests are collected, nor later among what that left: a fifth of the start."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, object, object]:
    """Before the first import of what is tested."""
    gc.disable()
    return (yield)


def pytest_collection_finish() -> None:
    """What is here now stays to the end."""
    gc.freeze()
    gc.enable()
