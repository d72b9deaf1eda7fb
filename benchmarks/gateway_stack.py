"""A server of a tiny model, a gateway and a publisher, each a process, and what every user's model says."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway_publisher import publish
from benchmarks.record import ROOT
from soppu.gateway.keys import KeyStore
from soppu.models import resolve
from soppu.registry import Registry
from soppu.serve.port import claim_port
from soppu.settings import toml
from tests.soppu.serve import tiny

_SERVER = multiprocessing.get_context("forkserver")  # a publisher begins at once, not after its imports
_SERVER.set_forkserver_preload(["benchmarks.gateway_publisher"])
PROMPT, TOKENS, TOKEN = "the quick", 8, "an-admin-token"


@dataclass(frozen=True)
class Version:
    """One bundle of all users, in the registry and as a file."""

    bundle_id: str
    path: Path


@dataclass
class Process:
    """A command that is started, killed and started again."""

    words: list[str]
    ready: str  # an address that answers 200 once it serves
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it serves."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment}
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(self.words, cwd=ROOT, env=variables, stdout=log, stderr=log)
        if wait:
            self.wait()

    def wait(self, seconds: float = 120.0) -> None:
        """Until it serves. TimeoutError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.running is not None and self.running.poll() is None, self.log.read_text()[-2000:]
            if self._serves():
                return
            time.sleep(0.05)
        raise TimeoutError(self.ready)

    def _serves(self) -> bool:
        try:
            return httpx.get(self.ready, timeout=1.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """SIGKILL."""
        assert self.running is not None
        self.running.kill()
        self.running.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what does not hear it."""
        if self.running is not None and self.running.poll() is None:
            self.running.terminate()
            try:
                self.running.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Stack:
    """All of it."""

    folder: Path
    server: Process
    gateway: Process
    server_url: str
    url: str
    registry: Registry
    versions: list[Version]
    keys: Mapping[str, str]
    says: dict[str, dict[str, str]] = field(default_factory=dict)  # bundle id -> user -> text

    def __enter__(self) -> Stack:
        self.server.start()
        for version in self.versions:
            self.publish(version)
            self.says[version.bundle_id] = {user: self._direct(user, version.bundle_id) for user in self.keys}
        self.gateway.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.stop()
        self.server.stop()
        self.registry.close()

    def publisher(self, version: Version) -> BaseProcess:
        """A process that publishes a version, as the pipeline does: staged, tried, switched, noted."""
        asked = (self.folder / "registry", self.server_url, TOKEN, version.path)
        made = _SERVER.Process(target=publish, args=asked)
        made.start()
        return made

    def publish(self, version: Version) -> None:
        """The same to its end."""
        made = self.publisher(version)
        made.join()
        assert made.exitcode == 0

    def _direct(self, user: str, bundle_id: str) -> str:
        asked = body() | {"parameters": {**body()["parameters"], "adapter_id": f"{user}@{bundle_id}"}}
        answer = httpx.post(f"{self.server_url}/generate", json=asked, trust_env=False, timeout=60)
        return str(answer.raise_for_status().json()["generated_text"])


def body(tokens: int = TOKENS) -> dict[str, Any]:
    """What every request asks for."""
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": tokens, "ignore_eos_token": True}}


def stack(folder: Path, *, users: int, settings: Mapping[str, Any], server: tuple[str, ...] = ()) -> Stack:
    """A stack that is not started: two versions of everybody, of which the second is published."""
    base = tiny.base(folder / "model")
    known = resolve(str(base), cache=folder / "cache")
    registry, model = Registry.open(folder / "registry"), tiny.llama()
    names = [f"user{number:03d}" for number in range(users)]
    versions = []
    for number in range(2):
        adapters = {
            user: tiny.lora(model, seed=1000 * number + place, rank=2, base_hash=known.hash)
            for place, user in enumerate(names)
        }
        held = {user: registry.put_adapter(adapter, user=user) for user, adapter in adapters.items()}
        path = folder / f"version-{number}.soppu"
        bundle_id = tiny.bundle(adapters).save(path)
        registry.put_bundle(path.read_bytes(), set_id=registry.freeze(held))
        versions.append(Version(bundle_id, path))
    store = KeyStore(registry.catalogue)
    keys = {user: store.create(user)[0] for user in names}
    ports = free_ports(2)
    server_url, url = (f"http://127.0.0.1:{port}" for port in ports)
    (folder / "gateway.toml").write_text(toml(dict(settings)))
    serve = [
        "serve",
        "--model",
        str(base),
        "--cache",
        str(folder / "cache"),
        "--state",
        str(folder / "state"),
    ]
    serve += ["--port", str(ports[0]), "--threads", "1", *server]
    door = ["gateway", "--config", str(folder / "gateway.toml"), "--registry", str(folder / "registry")]
    door += ["--port", str(ports[1])]
    return Stack(
        folder,
        Process(_soppu(serve), f"{server_url}/health", folder / "server.log", {"SOPPU_ADMIN_TOKEN": TOKEN}),
        Process(_soppu(door), f"{url}/health", folder / "gateway.log"),
        server_url,
        url,
        registry,
        versions,
        keys,
    )


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    held = [claim_port("127.0.0.1", 0) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def _soppu(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "soppu.cli", *words]


def lines(path: Path) -> list[dict[str, Any]]:
    """The gateway's own log of requests."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
