"""EmbeddedTarget: publishing to SOPPU's own server over HTTP, and starting one. Server: `soppu.serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

import soppu
from soppu.serve import admin_token as tokens
from soppu.targets import process
from soppu.targets.canary import Answered
from soppu.targets.http import HttpTarget, body


@dataclass(frozen=True)
class ServerLaunch:
    """How to start a server where none answers."""

    model: str  # see `soppu.models.resolve`
    cache: Path
    state: Path
    log: Path
    pid_file: Path
    dtype: str = "float32"
    threads: int = 0
    max_batch: int = 32
    resident_mib: int = 1024  # MiB of bundles' users in memory, beside those in use
    timeout: float = 180.0  # seconds until it has to be healthy; loading the model counts


class EmbeddedTarget(HttpTarget):
    """One of our own servers at `url`; arguments as `HttpTarget`."""

    SERVER, KIND, WHO = "soppu", "SOPPU server", "/info"
    GENERATE = "/generate"

    def start(self, launch: ServerLaunch) -> bool:
        """Start a server on this machine unless one is up. Waits, returns and raises as `_start` does."""
        search = [str(Path(soppu.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, search))}  # also from a checkout, anywhere
        if self._token:
            environment[tokens.VARIABLE] = self._token
        names = ("model", "cache", "state", "dtype", "threads", "max_batch", "resident_mib")
        options = self._options(**{name: getattr(launch, name) for name in names})
        command = [sys.executable, "-m", "soppu.cli", "serve", *options]
        server = process.Launch(command, launch.log, launch.pid_file, environment)
        return self._start(server, timeout=launch.timeout)

    def _asked(self, prompt: str, adapter_id: str, max_new_tokens: int) -> dict[str, Any]:
        parameters = {"adapter_id": adapter_id or None, "max_new_tokens": max_new_tokens, "details": True}
        return {"inputs": prompt, "parameters": parameters}

    def _answered(self, response: requests.Response) -> Answered:
        answer = body(response)
        tokens = answer.get("details", {}).get("tokens", ())
        return Answered(
            adapter_id=response.headers.get("x-adapter-id", ""),
            version=response.headers.get("x-adapter-version", ""),
            trace=tuple((int(token["id"]), float(token["logprob"])) for token in tokens),
            text=answer["generated_text"],
        )
