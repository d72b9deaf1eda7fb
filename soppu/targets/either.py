"""The target for a server of which only the address is known: ours, or vLLM with the plugin."""

from __future__ import annotations

from typing import Any

from soppu.errors import PortTaken
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import HttpTarget
from soppu.targets.vllm import VllmTarget


def serving_at(url: str, **known: Any) -> HttpTarget:
    """A target of the kind that answers at `url`; of ours where nobody does.

    Args:
        known: further arguments of `HttpTarget`.

    Raises:
        PortTaken: something else answers.
        TargetError: it serves another base model.
    """
    ours = EmbeddedTarget(url, **known)
    try:
        ours.is_up()
    except PortTaken:
        theirs = VllmTarget(url, **known)
        if not theirs.is_up():
            raise
        return theirs
    return ours
