"""The C library's heap, which keeps freed memory until it is trimmed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere nothing. Milliseconds.

    glibc puts blocks of up to 32 MiB on a heap that by itself shrinks only at its end. Batch after batch a
    small block that stays keeps a large hole from being given back, and a process grows by what it does not
    use.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
