"""A command on a pseudo-terminal, for tests that read what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping


def _as_a_shell_starts_it() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background are started with it ignored


class Terminal:
    """A command on a pseudo-terminal of its own, as a person would have it."""

    def __init__(
        self, *words: object, size: tuple[int, int] = (24, 100), env: Mapping[str, str] | None = None
    ) -> None:
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
        self._said, self._handle = bytearray(), ours
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=its,
            stdout=its,
            stderr=its,
            env={**clean, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(env or {})},
            start_new_session=True,
            preexec_fn=_as_a_shell_starts_it,
        )
        os.close(its)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._handle, 65536)
            except OSError:  # nobody writes any more
                return
            if not data:
                return
            self._said += data

    @property
    def raw(self) -> bytes:
        """Every byte so far."""
        return bytes(self._said)

    @property
    def text(self) -> str:
        """The same without what moves the cursor and sets colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))

    def until(self, words: str, *, timeout: float = 60) -> str:
        """Everything, once these words have been shown."""
        deadline = time.monotonic() + timeout
        while words not in self.text:
            ended = self.process.poll() is not None and not self._reading.is_alive()
            assert not ended and time.monotonic() < deadline, f"never said {words!r}:\n{self.text}"
            time.sleep(0.02)
        return self.text

    def key(self, key: bytes) -> None:
        """Press a key; Ctrl-C is b"\\x03", and the terminal makes a signal of it."""
        os.write(self._handle, key)

    def ended(self, *, timeout: float = 60) -> int:
        """The exit code, once everything it said has been read."""
        code = self.process.wait(timeout)
        self._reading.join(timeout)
        return code

    def close(self) -> None:
        """End what is left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reading.join(10)
        os.close(self._handle)
