"""Server: one of any of three kinds, asked as a stranger asks it. What its answers mean is `verify`'s."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import requests

from soppu.errors import TargetError
from soppu.serve.names import header_value
from soppu.targets.canary import Trace
from soppu.targets.http import body, refusal, request

KINDS = ("lorax", "vllm", "embedded")


@dataclass(frozen=True)
class Reply:
    """What came back. `status` is 0 where nothing did: `is_late`, or the connection was refused or cut."""

    status: int = 0
    error: str = ""
    adapter_id: str = ""  # who answered, as the server tells it
    trace: Trace = ()
    seconds: float = 0.0
    is_late: bool = False


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        kind: of KINDS.
        model_id: what it calls its base model.
        has_versions: it answers `user@bundle`: our own server, and vLLM with our plugin.
        source: what LoRAX is told about where an adapter lies; "" tells nothing.
        within: seconds an answer may take.
    """

    url: str
    kind: str
    model_id: str
    has_versions: bool = False
    source: str = ""
    token: str = ""
    within: float = 120.0

    @classmethod
    def find(cls, url: str, *, kind: str, token: str = "", source: str = "", within: float = 120.0) -> Server:
        """What listens at `url`; `kind` "auto" goes by what it says of itself.

        Raises:
            TargetError: nothing answers, or no server of such a kind.
        """
        url = url.rstrip("/")
        info = _get(f"{url}/info", token) if kind != "vllm" else {}
        ours = info.get("server") == "soppu"
        if info.get("model_id"):
            is_lorax = kind == "lorax" or not ours
            if kind == "embedded" and not ours:
                raise TargetError(f"{url}: asked for as embedded, but /info is not that of a SOPPU server")
            source = source or ("local" if is_lorax else "")
            named = "lorax" if is_lorax else "embedded"
            return cls(url, named, str(info["model_id"]), not is_lorax, source, token, within)
        listed = _get(f"{url}/v1/models", token).get("data") if kind in ("auto", "vllm") else None
        bases = [one["id"] for one in listed or () if not one.get("parent")]
        if not bases:
            raise TargetError(
                f"{url}: {kind if kind in KINDS else 'no LoRAX, vLLM or SOPPU server'} was looked for, but"
                " neither /info nor /v1/models names a base model"
            )
        plugin = _get(f"{url}/soppu/v1/info", token)
        has_plugin = plugin.get("server") == "soppu-vllm"
        name = str(plugin["model_id"]) if has_plugin else str(bases[0])
        return cls(url, "vllm", name, has_plugin, "", token, within)

    @property
    def refuses_with(self) -> int:
        """The status of an answer for an adapter that is not there."""
        return 404 if self.kind == "vllm" else 424

    def ask(self, prompt: str, adapter_id: str, *, tokens: int) -> Reply:
        """A greedy generation; "" asks the base model."""
        if self.kind == "vllm":
            asked: dict[str, Any] = {"model": adapter_id or self.model_id, "prompt": prompt}
            asked |= {"max_tokens": tokens, "temperature": 0, "logprobs": 0, "return_token_ids": True}
            return self._posted("/v1/completions", asked)
        parameters: dict[str, Any] = {"max_new_tokens": tokens, "details": True, "do_sample": False}
        if adapter_id:
            parameters |= {"adapter_id": adapter_id}
            parameters |= {"adapter_source": self.source} if self.source else {}
        return self._posted("/generate", {"inputs": prompt, "parameters": parameters})

    def post(self, path: str, content: dict[str, Any]) -> Reply:
        """Any request: what status and error it gives."""
        return self._posted(path, content, is_generation=False)

    def named(self, adapter_id: str) -> str:
        """How the server has to tell that it answered with this adapter."""
        return adapter_id if self.kind == "lorax" else header_value(adapter_id)

    def get(self, path: str) -> Reply:
        """A plain GET."""
        return self._sent("GET", path)[0]

    def _posted(self, path: str, content: dict[str, Any], *, is_generation: bool = True) -> Reply:
        reply, response = self._sent("POST", path, json=content)
        if response is None or response.status_code != 200 or not is_generation:
            return reply
        try:
            name, trace = _of_vllm(response) if self.kind == "vllm" else _of_lorax(response)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return Reply(200, f"the answer lacks tokens or logprobs: {error!r}", seconds=reply.seconds)
        return Reply(200, adapter_id=name, trace=trace, seconds=reply.seconds)

    def _sent(self, method: str, path: str, **content: Any) -> tuple[Reply, requests.Response | None]:
        begin = time.monotonic()
        try:
            timeout = (5.0, self.within)
            response = request(
                method, self.url + path, timeout=timeout, headers=_headers(self.token), **content
            )
        except requests.ReadTimeout:
            return Reply(error=f"no answer within {self.within:g} s", is_late=True), None
        except requests.RequestException as error:
            return Reply(error=f"the connection was refused or cut: {type(error).__name__}"), None
        said = "" if response.status_code < 300 else refusal(response)
        return Reply(response.status_code, said, seconds=time.monotonic() - begin), response


def _of_lorax(response: requests.Response) -> tuple[str, Trace]:
    tokens = body(response)["details"]["tokens"]
    trace = tuple((int(token["id"]), float(token["logprob"])) for token in tokens)
    return response.headers.get("x-adapter-id", ""), trace


def _of_vllm(response: requests.Response) -> tuple[str, Trace]:
    answer = body(response)
    choice = answer["choices"][0]
    logprobs = map(float, choice["logprobs"]["token_logprobs"])
    trace = tuple(zip(map(int, choice["token_ids"]), logprobs, strict=True))
    return header_value(str(answer["model"])), trace


def _headers(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _get(url: str, token: str) -> dict[str, Any]:
    """The object at a path, empty where there is none. TargetError if nothing answers."""
    try:
        response = request("GET", url, timeout=(5.0, 30.0), headers=_headers(token))
    except requests.RequestException as error:
        raise TargetError(f"GET {url}: no answer: {error}") from error
    return body(response) if response.status_code == 200 else {}
