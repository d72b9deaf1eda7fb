"""What SIGTERM and SIGINT do to a command that runs until it is told to stop, while it does not serve yet."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TIDY_SECONDS = 3.0


def log_to_stderr() -> None:
    """How such a command logs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@contextmanager
def until_told() -> Iterator[None]:
    """A signal within ends the process with exit code 0 and one line in the log, wherever it is.

    What is half done is tidied up on the way out, for a few seconds. A server that handles signals itself
    does so from then on. The first process of a container needs this most: without it the kernel lets no
    SIGTERM through to it. In a thread other than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _end:  # else it ends, and what comes now changes nothing
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    log_to_stderr()
    _LOG.info("stopped by %s before it served", signal.Signals(number).name)
    # for who swallows the exception, or waits in a thread
    threading.Thread(target=_end_for_good, daemon=True).start()
    raise SystemExit(0)


def _end_for_good() -> None:
    time.sleep(_TIDY_SECONDS)
    os._exit(0)
