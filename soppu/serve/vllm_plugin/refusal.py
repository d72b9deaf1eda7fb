"""Makes a refusal of ours the last line of vLLM's output, with no tracebacks before it.

vLLM's processes start one another, and what a worker raises reaches the first only as "see root cause above".
So the first owns a file, whose name the others inherit in the environment; who refuses writes there.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from soppu.errors import SoppuError

_VARIABLE = "SOPPU_REFUSAL_FILE"


def prepare() -> None:
    """In vLLM's first process: print a refusal of any of its processes last. Once."""
    if multiprocessing.parent_process() is not None or sys.excepthook is _last_words:
        return
    descriptor, name = tempfile.mkstemp(prefix="soppu-")
    os.close(descriptor)
    os.environ[_VARIABLE] = name
    sys.excepthook = _last_words
    atexit.register(_end, Path(name))  # registered first, so it runs last


@contextmanager
def noted() -> Iterator[None]:
    """Note a SoppuError raised inside.

    A process that vLLM has started then ends without a traceback; it also does where anything fails inside
    after another process has refused.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, SoppuError)
        if multiprocessing.parent_process() is None or not (ours or _said()):
            raise  # a program that runs the engine inside itself may go on
        if ours:
            _note(error)
        raise SystemExit(1) from error


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, SoppuError):
        _note(error)
    if not _said():
        sys.__excepthook__(kind, error, trace)


def _note(error: BaseException) -> None:
    if name := os.environ.get(_VARIABLE):
        Path(name).write_text(str(error))


def _said() -> str:
    path = Path(os.environ.get(_VARIABLE, ""))
    return path.read_text() if path.is_file() else ""


def _end(path: Path) -> None:
    said = _said()
    path.unlink(missing_ok=True)
    if said:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(2, f"Error: {said}\n".encode())  # not through sys.stderr, whose lines vLLM prefixes
