"""Sources of text: settings for one, rows in it, and what reading it costs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from soppu.data_settings import DataConfig


def settings_of(source: Path, **changes: Any) -> DataConfig:
    """Settings for a small source."""
    return DataConfig(source=str(source), **{"min_examples": 1, **changes})


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    """A JSONL file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def pairs(user: str, count: int = 6, **more: Any) -> list[dict[str, Any]]:
    """Rows of prompt and completion."""
    return [
        {"user_id": user, "prompt": f"{user} asks {n}", "completion": f"answer {n}", **more}
        for n in range(count)
    ]


class Counter:
    """Files below a folder that this process opens, what it writes, whom it asks, and bytes that it reads."""

    def __init__(self) -> None:
        self.below, self.opened, self.read = "", list[str](), 0
        self.written, self.asked = list[str](), list[str]()
        sys.addaudithook(self._hear)  # for good, there is no way to remove one

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.below:
            return
        if event == "open" and str(details[0]).startswith(self.below):
            self.opened.append(Path(str(details[0])).name)
        if event == "open" and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            self.written.append(str(details[0]))
        if event.startswith("socket.") and event != "socket.__new__":
            self.asked.append(event)

    @contextmanager
    def counting(self, folder: Path) -> Iterator[Counter]:
        self.opened, self.written, self.asked, before = [], [], [], _bytes_read()
        self.below = str(folder)
        try:
            yield self
        finally:
            self.below, self.read = "", _bytes_read() - before


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture(scope="session")
def counter() -> Counter:
    return Counter()
