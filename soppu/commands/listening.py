"""What Ctrl-C does to a command that shows a run: it is noted, and the command leaves by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Told:
    """Which signal came, if one did: it alone decides the exit code, wherever the program was."""

    number: int = 0

    @property
    def exit_code(self) -> int:
        """As a shell reports a program that a signal ended."""
        return 128 + self.number


@contextmanager
def listening() -> Iterator[Told]:
    """Take note of SIGINT and SIGTERM, and interrupt nothing; a second one ends the process at once.

    Signals that whoever started us had ignored stay so. Once one has come they are not given back: what comes
    while the program ends changes its exit code no more. In a thread other than the main one nothing is
    changed, and nothing is ever told.
    """
    told = Told()

    def note(number: int, _: FrameType | None) -> None:
        if told.number:
            os.write(1, b"\x1b[?25h" if os.isatty(1) else b"")  # the cursor, which a screen hides
            os._exit(told.exit_code)
        told.number = number

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield told
    finally:
        if not told.number:
            for number, handler in before.items():
                signal.signal(number, handler)
