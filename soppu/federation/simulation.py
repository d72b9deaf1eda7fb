"""A federated simulation as a set of processes that we own: started, watched, and always ended.

Flower's own `local` connection leaves a SuperLink running and shares it between runs. Here every run has a
SuperLink, a port and a Flower home of its own, and whatever it started is gone when the call returns, or when
the process that made it has died.
This file starts Flower's programs; it does not import Flower.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from soppu.errors import FederationError

RESULT, PROGRESS = "result.json", "progress.json"
FEDERATE, LEARN, EVALUATE = "federate", "learn-basis", "evaluate"  # what a ServerApp can be asked to do
_MARK = "SOPPU_SIMULATION"
# First in PATH of what we start: Flower starts its programs by their names.
_SIMULATION = """#!{python}
import sys
sys.path.insert(0, {app!r})
from server.simulate import main
del sys.path[0]
main()
"""
_CONNECTION = """[superlink]
default = "soppu"

[superlink.soppu]
address = "127.0.0.1:{port}"
insecure = true
"""
_QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run builds an environment of its own
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# oneDNN keeps what it has prepared for each shape of input, megabytes each; few shapes come twice here
LEAN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


@dataclass(frozen=True)
class Simulation:
    """One run."""

    app: Path  # folder with the pyproject.toml that names the Flower apps
    config: Path  # the frozen configuration file handed to them
    workdir: Path  # where checkpoints, progress and the result go; a second attempt continues from it
    users: int  # simulated clients
    client_cpus: int = 1  # cores each of them may take; how many run at a time follows from it
    client_gpus: float = 0.0  # of a GPU, to each of them
    timeout_s: float = 3600.0  # after this the run has failed
    task: str = FEDERATE


def run(
    simulation: Simulation, *, on_progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run to the end and return the server's `result.json`. One call a work folder at a time.

    Args:
        on_progress: called with `{"note", "share"}` whenever the server says something new.

    Raises:
        FederationError: it ended without a result, or ran out of time; the message has the log's last lines.
    """
    simulation.workdir.mkdir(parents=True, exist_ok=True)
    result = simulation.workdir / RESULT
    log = simulation.workdir / "flower.log"
    with _environment(simulation) as (environment, port), log.open("ab") as stream:
        end_processes(environment[_MARK])  # of an attempt that was killed
        result.unlink(missing_ok=True)
        try:
            _start_watchdog(environment, stream)
            superlink = _start_superlink(environment, port, stream)
            client = _start_run(simulation, environment, stream)
            _watch(simulation, (superlink, client), on_progress)
        finally:
            end_processes(environment[_MARK])
    if not result.exists():
        raise FederationError(f"the federated run ended without a result; {log}:\n{tail(log)}")
    return dict(json.loads(result.read_text()))


def end_processes(mark: str, *, variable: str = _MARK) -> int:
    """Kill every process whose environment holds this mark, however deep; returns how many there were."""
    ended = 0
    for _ in range(10):  # one that is about to die may have forked after the list was made: look again
        found = _kill_marked(mark, variable)
        if not found:
            break
        psutil.wait_procs(found, timeout=10)
        ended += len(found)
    return ended


def _kill_marked(mark: str, variable: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == mark:
                process.kill()
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or not ours to look at
    return found


def end_after(pid: int, started: float, mark: str) -> None:
    """Wait until the process `pid` that was started at `started` is gone, then end what holds the mark."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        ours = process.create_time() == started  # else its number has gone to another by now
        while ours and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    end_processes(mark)


def mark_of(workdir: Path) -> str:
    """What all processes of a run carry in their environment; the same for every attempt at it."""
    return hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:32]


def tail(path: Path, *, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _environment(simulation: Simulation) -> Iterator[tuple[dict[str, str], int]]:
    port = free_port()
    # short: Ray's socket paths have 107 characters
    with tempfile.TemporaryDirectory(prefix="soppu-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch, "flwr")
        home.mkdir()
        program = Path(scratch, "bin", "flwr-simulation")
        program.parent.mkdir()
        program.write_text(_SIMULATION.format(python=sys.executable, app=str(simulation.app)))
        program.chmod(0o755)
        (home / "config.toml").write_text(_CONNECTION.format(port=port))
        scripts = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            **_QUIET,
            **LEAN,
            _MARK: mark_of(simulation.workdir),
            "FLWR_HOME": str(home),
            "RAY_TMPDIR": scratch,
            "PATH": os.pathsep.join([str(program.parent), scripts, os.environ.get("PATH", "")]),
            "OMP_NUM_THREADS": str(simulation.client_cpus),
        }
        yield environment, port


def _start_watchdog(environment: dict[str, str], log: Any) -> None:
    """A process that outlives this one, and ends the others if this one is killed. It ends with them."""
    ours = psutil.Process()
    call = f"end_after({ours.pid}, {ours.create_time()!r}, {environment[_MARK]!r})"
    code = f"from soppu.federation.simulation import end_after; {call}"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]))
    _started([sys.executable, "-c", code], {**environment, "PYTHONPATH": path}, log)


def _start_superlink(environment: dict[str, str], port: int, log: Any) -> subprocess.Popen[bytes]:
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    process = _started([*command, "--host", "127.0.0.1", "--port", str(port)], environment, log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(requests.RequestException):  # not listening yet
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok:
                return process
        time.sleep(0.2)
    raise FederationError(f"flower-superlink did not come up on port {port} (exit code {process.poll()})")


def _start_run(simulation: Simulation, environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    values = {"config": str(simulation.config.resolve()), "workdir": str(simulation.workdir.resolve())}
    values["task"] = simulation.task
    wanted = simulation.users * simulation.client_cpus
    cores = max(min(os.cpu_count() or 1, wanted), simulation.client_cpus)  # no more actors than users
    resources = (
        f"num-supernodes={simulation.users} client-resources-num-cpus={simulation.client_cpus}"
        f" client-resources-num-gpus={simulation.client_gpus} init-args-num-cpus={cores}"
    )
    run_config = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    command = ["flwr", "run", str(simulation.app), "soppu", "--stream", "--run-config", run_config]
    return _started([*command, "--federation-config", resources], environment, log)


def _started(command: list[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _watch(
    simulation: Simulation,
    processes: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]],
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Return when `flwr run` has ended, the result is there, or the SuperLink has died."""
    superlink, client = processes
    deadline = time.monotonic() + simulation.timeout_s
    said = ""
    while client.poll() is None and superlink.poll() is None:
        if (simulation.workdir / RESULT).exists():
            return
        path = simulation.workdir / PROGRESS
        text = path.read_text() if path.exists() else ""
        if on_progress and text and text != said:
            said = text
            on_progress(json.loads(text))
        if time.monotonic() > deadline:
            raise FederationError(f"the federated run took longer than {simulation.timeout_s:.0f} s")
        time.sleep(0.5)
