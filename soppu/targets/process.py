"""A server as a detached process with a pid file. Not for talking to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import psutil

from soppu import files
from soppu.errors import TargetError
from soppu.targets import logs

_POLL_SECONDS = 0.2


class _Record(TypedDict):
    pid: int
    mark: str


@dataclass(frozen=True)
class Launch:
    """A process to start. `environment` is added to this process's own."""

    command: Sequence[str]
    log: Path
    pid_file: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def start(launch: Launch, *, ready: Callable[[], bool], timeout: float) -> int:
    """Start the process in a session of its own and wait until `ready()`; return its pid.

    Two starts on one pid file must not overlap: see `held`.

    Raises:
        TargetError: the pid file names a process that still runs (nothing is started then); or ours ended
            first, or was not ready within `timeout` seconds (it is stopped then): the message holds the
            last lines of its log, and the first error in it.
    """
    if running(launch.pid_file):
        raise TargetError(f"{launch.pid_file}: names a process that still runs; stop it first")
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    with launch.log.open("ab") as log:
        begin = log.tell()
        process = psutil.Popen(
            list(launch.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **launch.environment},
        )
    record: _Record = {"pid": process.pid, "mark": _mark(process)}
    files.write_text(launch.pid_file, json.dumps(record))
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        if ready() and process.poll() is None:  # another server may be the one that answers
            return process.pid
        time.sleep(_POLL_SECONDS)
    code = process.poll()
    why = f"was not ready after {timeout:g} s" if code is None else f"ended with exit code {code}"
    _end(record)
    _forget(launch.pid_file, record)
    raise TargetError(f"the server {why}; last lines of {launch.log}:\n{_tail(launch.log, begin)}")


def held(pid_file: Path) -> AbstractContextManager[None]:
    """Let one process, or thread, at a time start what the pid file will name; the others wait.

    The lock is the file `<pid_file>.lock`, which stays.
    """
    return files.exclusive(pid_file.with_name(f"{pid_file.name}.lock"))


def stop(pid_file: Path, *, grace: float = 15.0) -> bool:
    """End the process a pid file names: SIGTERM, and SIGKILL after `grace` seconds. The file is removed.

    Returns:
        False if there was no such process any more.
    """
    if not pid_file.exists():
        return False
    record = _read(pid_file)
    ended = _end(record, grace=grace)
    _forget(pid_file, record)
    return ended


def running(pid_file: Path) -> bool:
    """Whether the process a pid file names is still there; False if there is no such file."""
    return pid_file.exists() and _named(_read(pid_file)) is not None


def _end(record: _Record, *, grace: float = 15.0) -> bool:
    process = _named(record)
    if process is None:
        return False
    # a killed process ends none of the workers it started: they are of its group
    for send, patience in ((process.terminate, grace), (lambda: os.killpg(process.pid, signal.SIGKILL), 5.0)):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            send()
        if not psutil.wait_procs([process], timeout=patience)[1]:
            break
    return True


def _forget(pid_file: Path, record: _Record) -> None:
    """Remove the pid file, unless it names another process by now."""
    if pid_file.exists() and _read(pid_file) == record:
        pid_file.unlink(missing_ok=True)


def _read(pid_file: Path) -> _Record:
    record = json.loads(pid_file.read_text())
    return {"pid": int(record["pid"]), "mark": str(record["mark"])}


def _named(record: _Record) -> psutil.Process | None:
    """The process that was started; None if it has ended, or if another one has its pid by now."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        if _mark(process) == record["mark"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _mark(process: psutil.Process) -> str:
    """What tells two processes of one pid apart: seconds from boot to start, which no clock change moves."""
    return f"{process.create_time() - psutil.boot_time():.2f}"


def _tail(log: Path, begin: int) -> str:
    with log.open("rb") as stream:
        stream.seek(begin)
        return logs.tail(stream.read().decode(errors="replace").splitlines())
