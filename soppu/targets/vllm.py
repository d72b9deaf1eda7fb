"""VllmTarget: publishing to a vLLM server that runs our plugin, and starting one. Server: `vllm_plugin`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from soppu.errors import TargetError
from soppu.serve.names import header_value, split_version
from soppu.targets import process
from soppu.targets.canary import Answered, Trace
from soppu.targets.http import HttpTarget, body, refusal, request


@dataclass(frozen=True)
class VllmLaunch:
    """How to start a vLLM server where none answers.

    Attributes:
        python: of an environment with vLLM and this package in it; `make vllm` makes one.
        model: folder of the base model.
        bundle: the bundle file served from the start; later ones are published beside it.
        timeout: seconds until it has to be healthy; compiling the model takes minutes the first time.
        options: more of vLLM's own command-line options.
        environment: more variables, for instance SOPPU_MAX_ERROR.
    """

    python: Path
    model: Path
    bundle: Path
    log: Path
    pid_file: Path
    served_name: str = "base"
    dtype: str = "auto"
    timeout: float = 900.0
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class VllmTarget(HttpTarget):
    """One vLLM server at `url`; arguments as `HttpTarget`."""

    SERVER, KIND, WHO = "soppu-vllm", "vLLM server with the SOPPU plugin", "/soppu/v1/info"

    def start(self, launch: VllmLaunch) -> bool:
        """Start a server on this machine unless one is up; wait until it is healthy. False if one was up.

        Of several starts with one pid file, one starts a server and the others wait for it. The server it
        starts holds `launch.bundle`, active; bundles published later are gone when it ends.

        Raises:
            PortTaken: the port answers, but not as such a server; nothing is started.
            TargetError: there is no such Python; the server ended or was not healthy in time: the message
                holds the end of its log. Or the pid file names a process that still runs.
        """
        return self._start(launch.pid_file, lambda: self._process(launch), timeout=launch.timeout)

    def _process(self, launch: VllmLaunch) -> process.Launch:
        if not launch.python.exists():
            raise TargetError(f"{launch.python}: no such Python; `make vllm` makes an environment for vLLM")
        environment = self._environment(launch)
        return process.Launch(self._command(launch), launch.log, launch.pid_file, environment)

    def _environment(self, launch: VllmLaunch) -> dict[str, str]:
        own = {"SOPPU_BUNDLE": str(launch.bundle.resolve()), "SOPPU_ADMIN_TOKEN": self._token}
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        return quiet | own | dict(launch.environment)

    def _command(self, launch: VllmLaunch) -> list[str]:
        parts = urlsplit(self.url)
        options = {
            "--model": launch.model,
            "--served-model-name": launch.served_name,
            "--host": parts.hostname,
            "--port": parts.port or 80,
            "--dtype": launch.dtype,
        }
        words = [str(word) for pair in options.items() for word in pair]
        # the `vllm` script needs metadata that its CPU build does not carry
        server = ["-m", "vllm.entrypoints.openai.api_server"]
        return [str(launch.python), *server, *words, *launch.options]

    def _generate(self, prompt: str, adapter_id: str, max_new_tokens: int) -> requests.Response:
        asked: dict[str, Any] = {
            "model": adapter_id or self._base_name(),
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "logprobs": 0,
            "return_token_ids": True,
            # computed anew each time: a cached prefix is rounded otherwise, and canaries compare exactly
            "cache_salt": uuid.uuid4().hex,
        }
        try:
            return request("POST", f"{self.url}/v1/completions", json=asked, timeout=self._timeout)
        except requests.RequestException as error:
            raise TargetError(f"{self.url}: no answer to a generation: {error}") from error

    def _base_name(self) -> str:
        try:
            return str(body(request("GET", f"{self.url}{self.WHO}", timeout=self._timeout))["model_id"])
        except (requests.RequestException, KeyError) as error:
            raise TargetError(f"{self.url}: does not say what its base model is called: {error}") from error

    def _answered(self, response: requests.Response) -> Answered:
        """The answer names who answered; for a staged user that holds the whole bundle id."""
        if response.status_code != 200:
            return Answered(refusal=refusal(response), adapter_id="", version="", trace=())
        name = str(body(response).get("model", ""))
        return Answered("", header_value(name), split_version(name)[1], _trace(response))

    def _text(self, response: requests.Response) -> str:
        return str(response.json()["choices"][0]["text"])


def _trace(response: requests.Response) -> Trace:
    choice = body(response)["choices"][0]
    numbers = choice["logprobs"]["token_logprobs"]
    return tuple(
        (int(token), float(number)) for token, number in zip(choice["token_ids"], numbers, strict=True)
    )
