"""How the plugin puts its own code in place of vLLM's. What it replaces: `frontend.hooks`, `worker.hooks`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    """Have `owner.name(...)` call `hook(original, ...)`; both may be coroutine functions."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, hooked)
