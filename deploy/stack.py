"""The local stack: a Prefect server and a process worker, started if none is up, stopped if we started them.

    python -m deploy.stack up | down | status

What was started here has a pid file under the state folder, or is a container labelled with it; `down` ends
those and nothing else. Containers are stopped, not removed: a publication starts them again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import click
import requests

from soppu.errors import PortTaken, SoppuError, TargetError
from soppu.federation.simulation import end_processes
from soppu.targets import container, process
from soppu.targets.http import unreachable

ROOT = Path(__file__).resolve().parents[1]
POOL = "soppu"
WORKER = "soppu-local"
MARK = "SOPPU_STACK"


@dataclass(frozen=True)
class Stack:
    """Where the stack lives.

    Attributes:
        api: URL of the Prefect API, `http://host:port/api`.
        state: folder for databases, logs and pid files.
        serve_state: folder of the servers that publications start, whose pid files and containers `down`
            knows too.
    """

    api: str = "http://127.0.0.1:4200/api"
    state: Path = field(default_factory=lambda: ROOT / ".soppu")
    serve_state: Path = field(default_factory=lambda: ROOT / ".soppu" / "serve")

    @property
    def environment(self) -> dict[str, str]:
        """What server, worker and commands are started with."""
        scripts = str(Path(sys.executable).parent)
        return {
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLIENT_MAX_RETRIES": "9",  # each wait twice as long: a server may be away for minutes
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # Prefect's 10 is what somebody who started a run waits for
            "DO_NOT_TRACK": "1",
            "SOPPU_HOME": str(ROOT),
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        }

    @property
    def mark(self) -> str:
        """What every process that descends from this stack carries in its environment."""
        return hashlib.sha256(str(self.state.resolve()).encode()).hexdigest()[:32]

    @property
    def dashboard(self) -> str:
        """URL of the Prefect UI."""
        return self.api.removesuffix("/api")

    def pid_file(self, name: str) -> Path:
        """Pid file of something this stack starts."""
        return self.state / "run" / f"{name}.pid"


def up(stack: Stack) -> dict[str, bool]:
    """Bring server, worker and deployments up; name -> whether it was started by this call.

    Raises:
        PortTaken: something that is no Prefect server answers at the API's address.
        TargetError: the server or the worker did not come up; the message has the end of its log.
    """
    started = {"prefect server": _server(stack)}
    started["worker"] = _worker(stack)
    _prefect(stack, "--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
    return started


def down(stack: Stack) -> dict[str, bool]:
    """End what `up` and the pipeline started; name -> whether there was something to end."""
    ended = {"worker": process.stop(stack.pid_file("worker"))}
    if ended["worker"]:
        # Prefect goes on calling a stopped worker online; the next `up` should not believe it
        requests.delete(f"{stack.api}/work_pools/{POOL}/workers/{WORKER}", timeout=30)
    ended["prefect server"] = process.stop(stack.pid_file("prefect-server"))
    ended["embedded server"] = process.stop(stack.serve_state / "server.pid")
    ended["vLLM server"] = process.stop(stack.serve_state / "vllm.pid")
    ended["runs under way"] = end_processes(stack.mark, variable=MARK) > 0
    for name in container.owned(stack.serve_state):  # last: a run may have started one
        ended[f"container {name}"] = container.stop(name)
    return ended


def healthy(stack: Stack) -> bool:
    """Whether a Prefect API answers; False if nothing listens, PortTaken if something else does."""
    try:
        response = requests.get(f"{stack.api}/health", timeout=10)
    except requests.RequestException as error:
        if unreachable(error):
            return False
        raise PortTaken(f"{stack.api}: something listens, but is no Prefect server: {error}") from None
    if response.status_code != 200 or response.text.strip() != "true":
        raise PortTaken(f"{stack.api}: answers, but not as a Prefect server: {response.text[:80]!r}")
    return True


def workers(stack: Stack) -> list[str]:
    """Names of the workers that are online in our pool."""
    response = requests.post(f"{stack.api}/work_pools/{POOL}/workers/filter", json={}, timeout=30)
    return [item["name"] for item in response.json() if item["status"] == "ONLINE"] if response.ok else []


def _server(stack: Stack) -> bool:
    if healthy(stack):
        return False
    address = urlsplit(stack.api)
    if address.hostname not in ("127.0.0.1", "localhost"):
        raise TargetError(f"{stack.api}: no Prefect server answers, and it is not this machine's to start")
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(address.port)]
    _start(stack, "prefect-server", command, lambda: _answers(stack))
    return True


def _answers(stack: Stack) -> bool:
    """As `healthy`, of a server of ours that may still be coming up: whatever else answers is "not yet"."""
    try:
        return healthy(stack)
    except PortTaken:
        return False


def _worker(stack: Stack) -> bool:
    pid_file = stack.pid_file("worker")
    # The API goes on calling our own online after it was killed: its pid file knows better.
    if process.running(pid_file) or [name for name in workers(stack) if name != WORKER]:
        return False
    requests.delete(f"{stack.api}/work_pools/{POOL}/workers/{WORKER}", timeout=30)
    # it makes the pool, if there is none
    command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER]
    _start(stack, "worker", command, lambda: WORKER in workers(stack))
    return True


def _start(stack: Stack, name: str, command: list[str], ready: Callable[[], bool]) -> None:
    scripts = Path(sys.executable).parent
    launch = process.Launch(
        command=[str(scripts / command[0]), *command[1:]],
        log=stack.state / "logs" / f"{name}.log",
        pid_file=stack.pid_file(name),
        environment=stack.environment,
    )
    process.start(launch, ready=ready, timeout=120)


def _prefect(stack: Stack, *arguments: str) -> None:
    command = [str(Path(sys.executable).parent / "prefect"), *arguments]
    environment = {**os.environ, **stack.environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(f"prefect {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


@click.command()
@click.argument("action", type=click.Choice(["up", "down", "status"]))
@click.option("--api", envvar="PREFECT_API_URL", default="http://127.0.0.1:4200/api", show_default=True)
def main(action: str, api: str) -> None:
    """Start, stop or look at the local Prefect server and worker."""
    stack = Stack(api=api)
    try:
        if action == "up":
            for name, new in up(stack).items():
                click.echo(f"{name}: {'started' if new else 'was up already'}")
            click.echo(f"Prefect UI: {stack.dashboard}")
        elif action == "down":
            for name, ended in down(stack).items():
                click.echo(f"{name}: {'stopped' if ended else 'not ours, or not running'}")
        else:
            click.echo(f"prefect server: {'up' if healthy(stack) else 'down'}  {stack.api}")
            click.echo(f"workers online: {', '.join(workers(stack)) if healthy(stack) else '-'}")
            running = [f"{name} ({state})" for name, state in container.owned(stack.serve_state).items()]
            click.echo(f"containers: {', '.join(running) or '-'}")
    except SoppuError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
