"""HttpTarget: what every serving target with our admin routes shares. How each one generates is its own.

Subclasses say how their server tells who it is, how a generation is asked for and how its answer is read.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from soppu.errors import PortTaken, TargetError
from soppu.serve import admin_token as tokens
from soppu.serve.names import header_value
from soppu.targets import process

_CONNECT_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ROUNDING = 0.5  # more than rounding changes a logprob: bfloat16 logits from 16 on are 0.125 apart
Trace = tuple[tuple[int, float], ...]  # (token id, logprob) of every generated token


@dataclass(frozen=True)
class Answered:
    """What came back: `refusal` is the error, "" where there was an answer."""

    refusal: str = ""
    adapter_id: str = ""
    version: str = ""
    trace: Trace = ()
    text: str = ""


class HttpTarget(ABC):
    """One server at `url`.

    Args:
        base_hash: the base model it has to serve; "" leaves that unchecked.
        admin_token: sent with admin requests.
        token_file: holds the token where none is given; a server on this machine may write it at its start.
        timeout: seconds a single answer may take.
    """

    SERVER: ClassVar[str]  # what the server calls itself
    KIND: ClassVar[str]  # what messages call it
    WHO: ClassVar[str]  # the path it says so at
    GENERATE: ClassVar[str]  # the path of a generation

    def __init__(
        self,
        url: str,
        *,
        base_hash: str = "",
        admin_token: str = "",
        token_file: Path | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._base_hash = base_hash
        self._token = admin_token
        self._token_file = token_file
        self._timeout = (_CONNECT_SECONDS, timeout)

    @abstractmethod
    def _asked(self, prompt: str, adapter_id: str, max_new_tokens: int) -> dict[str, Any]:
        """The body that asks for a greedy generation; "" is the base model."""

    @abstractmethod
    def _answered(self, response: requests.Response) -> Answered:
        """A generation that was not refused."""

    def is_up(self) -> bool:
        """Whether a server of this kind and base model answers. False if nothing listens.

        Raises:
            PortTaken: something else answers; the message says what.
            TargetError: such a server answers, with another base model.
        """
        try:
            response = request("GET", f"{self.url}{self.WHO}", timeout=(_CONNECT_SECONDS, 10.0))
        except requests.ReadTimeout:
            raise PortTaken(
                f"{self.url}: something listens, but does not answer; it may be a server that still loads"
            ) from None
        except requests.RequestException as error:
            if unreachable(error):
                return False
            raise PortTaken(f"{self.url}: something listens, but is no {self.KIND}: {error}") from None
        info = body(response)
        if response.status_code != 200 or info.get("server") != self.SERVER:
            raise PortTaken(
                f"{self.url}: no {self.KIND}: GET {self.WHO} gave HTTP {response.status_code} from"
                f" {response.headers.get('server', 'an unnamed server')!r}: {response.text[:80]!r}"
            )
        if self._base_hash and info["base_hash"] != self._base_hash:
            raise TargetError(
                f"{self.url}: serves base model {info['base_hash'][:12]} ({info['model_id']}),"
                f" expected {self._base_hash[:12]}"
            )
        return True

    def _start(self, server: process.Launch, *, timeout: float) -> bool:
        """Start `server` unless one is up; wait until it is healthy. False if one was up.

        Of several starts with one pid file, one starts a server and the others wait for it.

        Raises:
            PortTaken: the port answers, but not as such a server; nothing is started.
            TargetError: the server ended or was not healthy in time; the message holds the end of its log.
                Or the pid file names a process that still runs, and serves elsewhere.
        """
        with process.held(server.pid_file):
            if self.is_up():
                return False
            process.start(server, ready=self._is_healthy, timeout=timeout)
        return True

    def bundles(self) -> tuple[str, ...]:
        """Ids of the bundles the server holds."""
        return tuple(bundle["bundle_id"] for bundle in self._admin("GET", "bundles")["bundles"])

    def publish(self, path: Path, *, bundle_id: str) -> bool:
        """Bring a bundle file to the server, staged. False if it was there. TargetError if refused."""
        if bundle_id in self.bundles():
            return False
        with path.open("rb") as stream:
            self._admin("PUT", f"bundles/{bundle_id}", data=stream)
        return True

    def activate(self, bundle_id: str) -> None:
        """Switch plain user names over to this bundle. TargetError if the server does not hold it."""
        self._admin("POST", f"bundles/{bundle_id}/activate")

    def active(self) -> str:
        """Id of the active bundle, "" if there is none."""
        return str(self._admin("GET", "bundles")["active"])

    def rollback(self, previous_id: str) -> None:
        """Switch back to the bundle that was active before; "" back to none."""
        if previous_id:
            self.activate(previous_id)
        else:
            self._admin("POST", "deactivate")

    def drop(self, bundle_id: str) -> None:
        """Delete a bundle that is not active from the server."""
        self._admin("DELETE", f"bundles/{bundle_id}")

    def complete(self, prompt: str, *, user: str = "", max_new_tokens: int = 24) -> str:
        """Greedy text after `prompt` with a user's adapter; "" is the base model. TargetError if refused."""
        answer = self._read(self._generate(prompt, user, max_new_tokens))
        if answer.refusal:
            raise TargetError(f"{self.url}: {answer.refusal}")
        return answer.text

    def canary(
        self,
        users: Sequence[str],
        prompt: str,
        *,
        bundle_id: str,
        zero_users: Collection[str] = (),
        max_new_tokens: int = 4,
        workers: int = 1,
    ) -> list[str]:
        """Generate once with every user's adapter in a bundle, active or only staged.

        Returns what was wrong with each user's answer, in the order of `users`; "" if nothing was.

        A user passes who gets an answer with that very adapter, at least one token, and finite logprobs that
        are not the base model's (but for `zero_users`, whose adapter is empty). Rounding differs with the
        company in a batch, so an answer close to the base model's is asked for again, alone: on an idle
        server an adapter without effect then gives the base model's numbers exactly. A server whose queue
        is full is asked again until the target's timeout.

        Args:
            workers: canaries under way at once.

        Raises:
            TargetError: the base model itself does not answer.
        """

        def ask(adapter_id: str) -> Answered:
            return self._read(self._patiently(prompt, adapter_id, max_new_tokens))

        base = ask("")
        if base.refusal:
            raise TargetError(f"{self.url}: the base model does not answer: {base.refusal}")
        with ThreadPoolExecutor(workers) as pool:
            answers = list(pool.map(ask, (f"{user}@{bundle_id}" for user in users)))
        faults = []
        for user, answer in zip(users, answers, strict=True):
            base_trace = None if user in zero_users else base.trace
            if base_trace is not None and is_close(answer.trace, base_trace):
                answer = ask(f"{user}@{bundle_id}")
            faults.append(fault(answer, user, bundle_id, base_trace=base_trace))
        return faults

    def _is_healthy(self) -> bool:
        try:
            return request("GET", f"{self.url}/health", timeout=(2.0, 1.0)).status_code == 200
        except requests.RequestException:
            return False

    def _generate(self, prompt: str, adapter_id: str, max_new_tokens: int) -> requests.Response:
        asked = self._asked(prompt, adapter_id, max_new_tokens)
        try:
            return request("POST", f"{self.url}{self.GENERATE}", json=asked, timeout=self._timeout)
        except requests.RequestException as error:
            raise TargetError(f"{self.url}: no answer to a generation: {error}") from error

    def _read(self, response: requests.Response) -> Answered:
        return self._answered(response) if response.status_code == 200 else Answered(refusal(response))

    def _options(self, **options: object) -> list[str]:
        """The address and `options` as words of a command line."""
        parts = urlsplit(self.url)
        given = {"host": parts.hostname, "port": parts.port or 80, **options}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def _patiently(self, prompt: str, adapter_id: str, max_new_tokens: int) -> requests.Response:
        """`_generate`, again and again while the server is overloaded, until the timeout of an answer."""
        deadline, pause = time.monotonic() + self._timeout[1], _FIRST_PAUSE
        while True:
            response = self._generate(prompt, adapter_id, max_new_tokens)
            if response.status_code != 429 or time.monotonic() + pause > deadline:
                return response
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _admin(self, method: str, path: str, *, data: IO[bytes] | None = None) -> dict[str, Any]:
        token = self._token or tokens.read(self._token_file)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"{self.url}/soppu/v1/{path}"
        try:
            response = request(method, url, data=data, headers=headers, timeout=self._timeout)
        except requests.RequestException as error:
            raise TargetError(f"{method} {url}: no answer: {error}") from error
        if response.status_code >= 300:
            raise TargetError(f"{method} {url}: {refusal(response)}")
        return body(response)


def fault(answer: Answered, user: str, version: str, *, base_trace: Trace | None) -> str:
    """What is wrong with an answer that `user` was asked for in a version of the bundle, "" if nothing.

    `base_trace` is the base model's for the same prompt; None for users whose adapter is empty.
    """
    adapter_id = f"{user}@{version}"
    if answer.refusal:
        return answer.refusal
    if answer.adapter_id != header_value(adapter_id) or answer.version != version:
        return (
            f"asked for {adapter_id!r} of {version!r}, served by {answer.adapter_id!r} of {answer.version!r}"
        )
    if not answer.trace:
        return "no tokens came back"
    if not all(math.isfinite(logprob) for _, logprob in answer.trace):
        return f"logprobs are not finite: {answer.trace}"
    if answer.trace == base_trace:
        return "the answer is the base model's: the adapter has no effect"
    return ""


def is_close(trace: Trace, other: Trace) -> bool:
    """Whether two traces differ by no more than rounding may: logprobs nearly equal as long as tokens are.

    Where two tokens are nearly as probable, rounding decides; what comes after that says nothing.
    """
    for (token, logprob), (other_token, other_logprob) in zip(trace, other, strict=False):
        if abs(logprob - other_logprob) >= _ROUNDING:
            return False
        if token != other_token:
            return True
    return len(trace) == len(other)


def request(method: str, url: str, *, timeout: tuple[float, float], **content: Any) -> requests.Response:
    """One request; `content` as `requests` takes it. Raises what `requests` raises."""
    with requests.Session() as session:
        # No proxy stands before this machine itself, and ~/.netrc must not replace the admin token.
        session.trust_env = urlsplit(url).hostname not in _LOOPBACK
        return session.request(method, url, timeout=timeout, **content)


def unreachable(error: requests.RequestException) -> bool:
    """Whether a request failed before there was a connection: nothing listened, or the name is unknown.

    It is read from the failure itself; who looks a second time may find a server that came up in between.
    """
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(reason, NewConnectionError | ConnectTimeoutError)


def body(response: requests.Response) -> dict[str, Any]:
    """The object an answer holds; empty where it holds none."""
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def refusal(response: requests.Response) -> str:
    """An answer that is not 200, in one line."""
    return f"HTTP {response.status_code}: {body(response).get('error') or response.text[:200]}"
