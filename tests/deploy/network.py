"""Machines of a test: network namespaces on one bridge, each with a user of the system of its own.

A namespace has addresses and links of its own; a user of its own cannot read another's folder. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
_WAY = f"/run/soppu-python-{os.getpid()}"  # where Python is bound to on its way from one place to another
# Python may lie in a folder that only root may enter. In a namespace it is open, and empty but for Python.
_ENTER = """
set -e
if [ -n "$1" ]; then
    mkdir -p "$3"
    mount --bind "$2" "$3"
    mount -t tmpfs -o mode=755 tmpfs "$1"
    mkdir -p "$2"
    mount --move "$3" "$2"
fi
shift 3
uid=$1
shift
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --no-new-privs "$@"
"""


def missing() -> str:
    """What a test on these machines lacks here, or ""."""
    if os.geteuid() != 0:
        return "needs root"
    if lacking := [tool for tool in ("ip", "setpriv", "openssl", "ssh-keygen") if not shutil.which(tool)]:
        return f"needs {', '.join(lacking)}"
    name = f"soppu{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Host:
    """One machine: a namespace, an address, a user of the system, a home that is that user's alone."""

    name: str
    namespace: str
    address: str
    uid: int
    home: Path
    link: str
    bridge: str
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, log: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a program that goes on; its output is in the home, in `log`."""
        with (self.home / log).open("ab") as stream:
            process = subprocess.Popen(
                self._enter(*command),
                env={**self.environment, **variables},
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, *command: str, check: bool = True, **variables: str) -> tuple[int, str]:
        """Run a program to its end.

        Into a file: a SuperNode's child waits for it to be gone, and we, at a pipe, would wait for the child.
        """
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                self._enter(*command),
                env={**self.environment, **variables},
                cwd=ROOT,
                stdout=output,
                stderr=output,
                timeout=120,
                check=False,
            )
            output.seek(0)
            said = output.read()
        assert done.returncode == 0 or not check, f"{self.name}: {command}: {said}"
        return done.returncode, said

    def cable(self, *, plugged: bool) -> None:
        """Pull the network cable, or put it back."""
        state = "up" if plugged else "down"
        _ip("-n", self.bridge, "link", "set", self.link, state)

    def said(self, log: str) -> str:
        """What is in a log by now."""
        path = self.home / log
        return path.read_text(errors="replace") if path.exists() else ""

    def _enter(self, *command: str) -> list[str]:
        hidden, needed = _closed_folder()
        inner = ["sh", "-c", _ENTER, "sh", hidden, needed, _WAY, str(self.uid)]
        return ["ip", "netns", "exec", self.namespace, *inner, *command]


@contextmanager
def hosts(folder: Path, names: Mapping[str, int]) -> Iterator[dict[str, Host]]:
    """`names`: host -> uid. At the end all that runs in the namespaces is killed, and they go."""
    prefix = f"soppu{os.getpid()}"
    bridge = f"{prefix}-net"
    made: dict[str, Host] = {}
    folder.chmod(0o755)
    try:
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for number, (name, uid) in enumerate(names.items(), start=1):
            made[name] = _host(folder / name, name, uid, prefix=prefix, number=number)
        yield made
    finally:
        for namespace in (*(host.namespace for host in made.values()), bridge):
            for _ in range(5):  # one that is about to die may have forked
                pids = _output("ip", "netns", "pids", namespace).split()
                for pid in pids:
                    _kill(int(pid))
                if not pids:
                    break
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        shutil.rmtree(_WAY, ignore_errors=True)
        for process in (process for host in made.values() for process in host.processes):
            process.wait(timeout=10)


def until(what: Callable[[], Any], *, seconds: float, why: Callable[[], str] = str) -> Any:
    """Wait until something is so, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why()}"
        time.sleep(0.1)
    return found


def _host(home: Path, name: str, uid: int, *, prefix: str, number: int) -> Host:
    namespace, bridge, link = f"{prefix}-{name}", f"{prefix}-net", f"v{number}"
    address = f"10.73.0.{number}"
    _ip("netns", "add", namespace)
    _ip("-n", bridge, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", bridge, "link", "set", link, "master", "br0", "up")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    home.mkdir()
    home.chmod(0o700)
    os.chown(home, uid, uid)
    environment = {
        "PATH": os.pathsep.join([str(Path(PYTHON).parent), "/usr/sbin:/usr/bin:/sbin:/bin"]),
        "PYTHON": PYTHON,
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "USER": name,
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return Host(name, namespace, address, uid, home, link, bridge, environment)


def _closed_folder() -> tuple[str, str]:
    """A folder above this Python that others may not enter, and what is needed of it; or ("", "")."""
    needed = Path(sys.base_prefix)
    for parent in reversed(needed.parents):
        if not parent.stat().st_mode & 0o001:
            return str(parent), str(needed)
    return "", ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
