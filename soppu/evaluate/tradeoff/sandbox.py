"""Runs programs that a model wrote, in a process that can do no harm; not one that cannot cheat.

A program has no network, no environment, no other processes, no right to write but into a small folder in
memory, and limits of time, memory, processes and files. It needs Linux 5.12, and root or user namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soppu.errors import SandboxError
from soppu.evaluate.tradeoff import sandbox_child

Outcome = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0  # of wall time
    memory: int = 256 << 20  # bytes of address space, of each process
    processes: int = 8  # at a time
    files: int = 8 << 20  # bytes, of all files together


USUAL = Limits()


def run(program: str, limits: Limits = USUAL) -> Outcome:
    """Whether a Python program runs to its very end: not if it raises, exits before, or takes too long.

    Its output is thrown away. Nothing of it is left when this returns.

    Raises:
        SandboxError: this machine cannot keep a program apart; it was not started.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="soppu-sandbox-") as folder:
        asked = {
            "program": program,
            "word": word,
            "folder": folder,
            "memory": limits.memory,
            "seconds": int(limits.seconds) + 1,
            "processes": limits.processes,
            "files": limits.files,
        }
        command = [sys.executable, "-I", "-S", "-B", str(Path(sandbox_child.__file__).resolve())]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            said = _told(child, json.dumps(asked).encode(), word, until=time.monotonic() + limits.seconds)
        finally:
            _end(child)
    if said is None:
        return "timed out"
    return "passed" if said == word.encode() else "failed"


def _told(child: subprocess.Popen[bytes], asked: bytes, word: str, *, until: float) -> bytes | None:
    """What the program's end wrote, at most a little more than it should; None if the time was over first."""
    assert child.stdin and child.stdout and child.stderr
    child.stdin.write(asked)
    child.stdin.close()
    said = b""
    while len(said) <= len(word):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        part = os.read(child.stdout.fileno(), 1024)
        if not part:
            break
        said += part
    if not said and child.wait(5) == sandbox_child.REFUSED:
        raise SandboxError(
            f"a program cannot be kept apart on this machine: {child.stderr.read().decode(errors='replace')};"
            " allowed: root with CAP_SYS_ADMIN, or user namespaces, on Linux 5.12 or newer"
        )
    return said


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the starter; what it started is told by the kernel to die with it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream:
            stream.close()
