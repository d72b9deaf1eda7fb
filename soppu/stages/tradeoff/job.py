"""What a process is told to generate. Apart from the engine that does it: whoever tells loads no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DTYPE = "float32"  # what the embedded server serves in

Done = Callable[[int, int], None]  # so many of so many


@dataclass(frozen=True)
class Job:
    """What one process is to do, as JSON values."""

    run: str
    arm: Mapping[str, Any]
    asks: Sequence[Mapping[str, Any]]
    new_tokens: int
    batch: int
    timed: int  # prompts of every user that are also asked alone
    timed_tokens: int  # new tokens of each of them, whatever they are
    stop: tuple[str, ...]
    threads: int
    seed: int
