"""Commands on pseudo-terminals, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.terminal import Terminal


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """`terminal("command", "argument", size=(rows, columns), env={...})`."""
    made: list[Terminal] = []

    def start(
        *words: object, size: tuple[int, int] = (24, 100), env: Mapping[str, str] | None = None
    ) -> Terminal:
        made.append(Terminal(*words, size=size, env=env))
        return made[-1]

    yield start
    for one in made:
        one.close()
