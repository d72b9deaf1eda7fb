"""Which class pushes to which kind of server, by the name a configuration or a publication gives it."""

from __future__ import annotations

from collections.abc import Mapping

from soppu.errors import TargetError
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import HttpTarget
from soppu.targets.vllm import VllmTarget

KINDS: Mapping[str, type[HttpTarget]] = {"embedded": EmbeddedTarget, "vllm": VllmTarget}


def of(kind: str) -> type[HttpTarget]:
    """The class of a kind. TargetError names the kinds there are."""
    if kind not in KINDS:
        raise TargetError(f"serving target {kind!r}: allowed are {', '.join(KINDS)}")
    return KINDS[kind]
