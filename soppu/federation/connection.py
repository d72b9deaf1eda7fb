"""A federated run on a SuperLink that is already there, whose SuperNodes are other people's machines.

The run is handed to Flower's own `flwr` command under the name of a connection in Flower's configuration
(`FLWR_HOME/config.toml`). The ServerApp runs beside the SuperLink, and writes its work folder and the
registry there: both have to be the same folders here. This file starts Flower's programs; it does not
import Flower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soppu import files
from soppu.errors import FederationError, SuperLinkAway
from soppu.federation.simulation import FEDERATE, PROGRESS, RESULT

RUN = "remote.json"  # the run that was started last, so that the next attempt can end it
_AWAY = "Connection to the SuperLink is unavailable"  # Flower's words
_PAUSES_S = (1.0, 2.0, 5.0, 10.0)  # between tries to reach a SuperLink; the last one again and again
_CALL_S = 60.0
# Waits for "done": where the process that waits for the run dies, in whatever way, the run is stopped.
_GUARD = 'read -r said; [ "$said" = done ] || for n in 1 2 3 4 5 6; do "$@" && exit; sleep 5; done'

OnProgress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Remote:
    """One run on a connection.

    Attributes:
        app: folder with the pyproject.toml that names the Flower apps.
        connection: its name in Flower's configuration.
        config: the frozen configuration file, handed to the ServerApp by its path.
        workdir: where the ServerApp writes progress and result, by the same path on both sides.
        task: what the ServerApp is to do: `simulation.FEDERATE`, `LEARN` or `EVALUATE`.
        timeout_s: after this the run has failed.
    """

    app: Path
    connection: str
    config: Path
    workdir: Path
    task: str = FEDERATE
    timeout_s: float = 3600.0


def run(remote: Remote, *, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Run to the end and return the server's `result.json`. One call a work folder at a time.

    A SuperLink that is away is waited for, one that has forgotten the run (it was restarted) is given it
    again; the ServerApp goes on after the last finished round. If this process is cancelled or killed, the
    run is stopped.

    Args:
        on_progress: called with `{"note", "share"}` whenever the server says something new.

    Raises:
        FederationError: it ended without a result, or ran out of time; the message has Flower's reason.
    """
    remote.workdir.mkdir(parents=True, exist_ok=True)
    result = remote.workdir / RESULT
    watch = _Watch(remote, on_progress, deadline=time.monotonic() + remote.timeout_s)
    watch.patiently(lambda: _stop_earlier(remote))
    result.unlink(missing_ok=True)
    ended = ""
    while not result.exists() and not ended:
        number = watch.patiently(lambda: _submit(remote))
        with _guarded(remote, number):
            ended = watch.until_end(number)
    if not result.exists():
        raise FederationError(f"run {number} on {remote.connection!r} ended without a result: {ended}")
    return dict(json.loads(result.read_text()))


def flower(*arguments: str) -> dict[str, Any]:
    """Call `flwr`, and give what it prints as JSON.

    Raises:
        SuperLinkAway: nobody answers at the connection's address.
        FederationError: Flower refused; the message is Flower's.
    """
    call = " ".join(("flwr", *arguments[:2]))
    try:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=_CALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SuperLinkAway(f"{call}: no answer within {_CALL_S:.0f} s") from None
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise FederationError(f"{call}: {(done.stderr or done.stdout).strip()}") from None
    if not said.get("success"):
        why = str(said.get("error-message", said)).strip()
        raise (SuperLinkAway if _AWAY in why else FederationError)(f"{call}: {why}")
    return dict(said)


def environment() -> dict[str, str]:
    """What Flower's commands are started with: those of this Python's own installation, and quiet ones."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass
class _Watch:
    """Follows a run by its work folder and by Flower's log of it."""

    remote: Remote
    on_progress: OnProgress | None
    deadline: float
    said: str = field(default="", init=False)

    def patiently(self, call: Callable[[], Any]) -> Any:
        """Call until the SuperLink is there, or it is too late."""
        for tries in range(10**6):
            try:
                return call()
            except SuperLinkAway as error:
                self._tell({"note": f"waiting for the SuperLink of {self.remote.connection!r}", "share": 0.0})
                if time.monotonic() > self.deadline:
                    raise FederationError(
                        f"{error}; waited {self.remote.timeout_s:.0f} s (federation.timeout_s)"
                    ) from error
                time.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])

    def until_end(self, number: str) -> str:
        """Why the run is over; "" where the SuperLink no longer knows it."""
        while True:
            with _streaming(self.remote, number) as stream:
                while stream.poll() is None and not (self.remote.workdir / RESULT).exists():
                    self._look()
                    time.sleep(0.5)
            if (self.remote.workdir / RESULT).exists():
                self._look()
                return "with a result"
            found = self.patiently(lambda: _status(self.remote, number))
            if not found:
                return ""
            if str(found["status"]).startswith("finished"):
                return f"{found['status']}: {found.get('status-details') or 'Flower gives no reason'}"
            self._look()
            time.sleep(_PAUSES_S[0])

    def _look(self) -> None:
        path = self.remote.workdir / PROGRESS
        if (text := path.read_text() if path.exists() else "") and text != self.said:
            self.said = text
            self._tell(json.loads(text))
        if time.monotonic() > self.deadline:
            raise FederationError(
                f"the run on {self.remote.connection!r} took longer than {self.remote.timeout_s:.0f} s"
            )

    def _tell(self, said: dict[str, Any]) -> None:
        if self.on_progress:
            self.on_progress(said)


def _submit(remote: Remote) -> str:
    values = {
        "config": str(remote.config.resolve()),
        "workdir": str(remote.workdir.resolve()),
        "task": str(remote.task),
    }
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    said = flower("run", str(remote.app), remote.connection, "--run-config", settings)
    number = str(said["run-id"])
    files.write_text(remote.workdir / RUN, json.dumps({"run-id": number, "connection": remote.connection}))
    return number


def _status(remote: Remote, number: str) -> Mapping[str, Any] | None:
    """What Flower says of a run; None if it does not know it."""
    try:
        rows = flower("ls", remote.connection, "--run-id", number)["runs"]
    except FederationError as error:
        if "not found" in str(error):  # Flower's words
            return None
        raise
    return dict(rows[0])


def _stop_earlier(remote: Remote) -> None:
    """End what an attempt has left that could not end it itself: two servers would share a work folder."""
    path = remote.workdir / RUN
    if not path.exists():
        return
    number = str(json.loads(path.read_text())["run-id"])
    found = _status(remote, number)
    if found and not str(found["status"]).startswith("finished"):
        flower("stop", number, remote.connection)
    path.unlink()


@contextmanager
def _guarded(remote: Remote, number: str) -> Iterator[None]:
    """Stop the run if this process does not come to the end of the block, whatever becomes of it."""
    command = ["sh", "-c", _GUARD, "sh", "flwr", "stop", number, remote.connection]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    ) as guard:
        assert guard.stdin is not None
        yield
        guard.stdin.write(b"done\n")  # on any error the pipe is closed without a word, as by a death


@contextmanager
def _streaming(remote: Remote, number: str) -> Iterator[subprocess.Popen[bytes]]:
    """`flwr log` beside us: it ends when the run does, or the SuperLink goes."""
    command = ["flwr", "log", number, remote.connection, "--stream"]
    with (remote.workdir / "flower.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
