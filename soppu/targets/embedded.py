"""EmbeddedTarget: publishing to SOPPU's own server over HTTP, and starting one. Server: `soppu.serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

import soppu
from soppu.errors import TargetError
from soppu.targets import process
from soppu.targets.canary import Answered, Trace
from soppu.targets.http import HttpTarget, body, refusal, request


@dataclass(frozen=True)
class ServerLaunch:
    """How to start a server where none answers.

    Attributes:
        model: see `soppu.models.resolve`.
        timeout: seconds until it has to be healthy; loading the model counts.
    """

    model: str
    cache: Path
    state: Path
    log: Path
    pid_file: Path
    dtype: str = "float32"
    threads: int = 0
    max_batch: int = 32
    timeout: float = 180.0


class EmbeddedTarget(HttpTarget):
    """One of our own servers at `url`; arguments as `HttpTarget`."""

    SERVER, KIND, WHO = "soppu", "SOPPU server", "/info"

    def start(self, launch: ServerLaunch) -> bool:
        """Start a server on this machine unless one is up; wait until it is healthy. False if one was up.

        Of several starts with one pid file, one starts a server and the others wait for it.

        Raises:
            PortTaken: the port answers, but not as a SOPPU server; nothing is started.
            TargetError: the server ended or was not healthy in time; the message holds the end of its log.
                Or the pid file names a process that still runs, and serves elsewhere.
        """
        return self._start(launch.pid_file, lambda: self._process(launch), timeout=launch.timeout)

    def _process(self, launch: ServerLaunch) -> process.Launch:
        search = [str(Path(soppu.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, search))}  # also from a checkout, anywhere
        if self._token:
            environment["SOPPU_ADMIN_TOKEN"] = self._token
        return process.Launch(self._command(launch), launch.log, launch.pid_file, environment)

    def _command(self, launch: ServerLaunch) -> list[str]:
        parts = urlsplit(self.url)
        options = {
            "--model": launch.model,
            "--cache": launch.cache,
            "--state": launch.state,
            "--host": parts.hostname,
            "--port": parts.port or 80,
            "--dtype": launch.dtype,
            "--threads": launch.threads,
            "--max-batch": launch.max_batch,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [sys.executable, "-m", "soppu.cli", "serve", *words]

    def _generate(self, prompt: str, adapter_id: str, max_new_tokens: int) -> requests.Response:
        parameters = {"adapter_id": adapter_id or None, "max_new_tokens": max_new_tokens, "details": True}
        asked: dict[str, Any] = {"inputs": prompt, "parameters": parameters}
        try:
            return request("POST", f"{self.url}/generate", json=asked, timeout=self._timeout)
        except requests.RequestException as error:
            raise TargetError(f"{self.url}: no answer to a generation: {error}") from error

    def _answered(self, response: requests.Response) -> Answered:
        refused = response.status_code != 200
        return Answered(
            refusal=refusal(response) if refused else "",
            adapter_id=response.headers.get("x-adapter-id", ""),
            version=response.headers.get("x-adapter-version", ""),
            trace=() if refused else _trace(response),
        )

    def _text(self, response: requests.Response) -> str:
        return str(response.json()["generated_text"])


def _trace(response: requests.Response) -> Trace:
    details = body(response).get("details", {})
    return tuple((int(token["id"]), float(token["logprob"])) for token in details.get("tokens", ()))
