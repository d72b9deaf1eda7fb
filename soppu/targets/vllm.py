"""VllmTarget: publishing to a vLLM server that runs our plugin, and starting one. Server: `vllm_plugin`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from soppu.errors import TargetError
from soppu.serve import admin_token as tokens
from soppu.serve.names import header_value, split_version
from soppu.targets import process
from soppu.targets.canary import Answered
from soppu.targets.http import HttpTarget, body, request


@dataclass(frozen=True)
class VllmLaunch:
    """How to start a vLLM server where none answers."""

    python: Path  # of an environment with vLLM and this package in it; `make vllm` makes one
    model: Path  # folder of the base model
    bundle: Path  # the bundle file served from the start; later ones are published beside it
    log: Path
    pid_file: Path
    served_name: str = "base"
    dtype: str = "auto"
    timeout: float = 900.0  # seconds until it has to be healthy; compiling takes minutes the first time
    state: Path | None = None  # what is published is kept there; by default beside the pid file
    options: tuple[str, ...] = ()  # more of vLLM's own command-line options
    environment: Mapping[str, str] = field(default_factory=dict)  # more, for instance SOPPU_MAX_ERROR


class VllmTarget(HttpTarget):
    """One vLLM server at `url`; arguments as `HttpTarget`."""

    SERVER, KIND, WHO = "soppu-vllm", "vLLM server with the SOPPU plugin", "/soppu/v1/info"
    GENERATE = "/v1/completions"

    def start(self, launch: VllmLaunch) -> bool:
        """Start a server on this machine unless one is up. Waits, returns and raises as `_start` does.

        It holds `launch.bundle`, active, or what was published to the server that kept its state there and
        began with the same bundle. TargetError also if there is no such Python.
        """
        if not launch.python.exists() and not self.is_up():
            raise TargetError(f"{launch.python}: no such Python; `make vllm` makes an environment for vLLM")
        options = self._options(model=launch.model, served_model_name=launch.served_name, dtype=launch.dtype)
        # the `vllm` script needs metadata that its CPU build does not carry
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        command = [str(launch.python), *module, *options, *launch.options]
        # the plugin has no state folder to make a token in: without one its admin routes stay closed
        token = self._token or (tokens.ensure(self._token_file) if self._token_file else "")
        state = launch.state or launch.pid_file.parent / "vllm-state"
        own = {"SOPPU_BUNDLE": str(launch.bundle.resolve()), "SOPPU_STATE": str(state.resolve())}
        own[tokens.VARIABLE] = token
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        variables = quiet | own | dict(launch.environment)
        server = process.Launch(command, launch.log, launch.pid_file, variables)
        return self._start(server, timeout=launch.timeout)

    def _asked(self, prompt: str, adapter_id: str, max_new_tokens: int) -> dict[str, Any]:
        return {
            "model": adapter_id or self._base_name(),
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "logprobs": 0,
            "return_token_ids": True,
            # computed anew each time: a cached prefix is rounded otherwise, and canaries compare exactly
            "cache_salt": uuid.uuid4().hex,
        }

    def _base_name(self) -> str:
        try:
            return str(body(request("GET", f"{self.url}{self.WHO}", timeout=self._timeout))["model_id"])
        except (requests.RequestException, KeyError) as error:
            raise TargetError(f"{self.url}: does not say what its base model is called: {error}") from error

    def _answered(self, response: requests.Response) -> Answered:
        """The answer names who answered; for a staged user that holds the whole bundle id."""
        answer = body(response)
        name, choice = str(answer.get("model", "")), answer["choices"][0]
        logprobs = map(float, choice["logprobs"]["token_logprobs"])
        return Answered(
            adapter_id=header_value(name),
            version=split_version(name)[1],
            trace=tuple(zip(map(int, choice["token_ids"]), logprobs, strict=True)),
            text=choice["text"],
        )
