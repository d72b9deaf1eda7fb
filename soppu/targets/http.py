"""HttpTarget: what every serving target with our admin routes shares. How each one generates is its own.

Subclasses say how their server tells who it is, how a generation is asked for and how its answer is read.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from soppu.errors import PortTaken, TargetError
from soppu.serve import admin_token as tokens
from soppu.targets import process
from soppu.targets.canary import Answered, Due, Trace, fault, is_close

_CONNECT_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    TAKES_JOINS: ClassVar[bool] = True  # whether users can join at the server itself

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
        if response.status_code != 200 or not self._is_ours(info):
            raise PortTaken(
                f"{self.url}: no {self.KIND}: GET {self.WHO} gave HTTP {response.status_code} from"
                f" {response.headers.get('server', 'an unnamed server')!r}: {response.text[:80]!r}"
            )
        self._check_base(info)
        return True

    def is_healthy(self) -> bool:
        """Whether whatever answers there calls itself healthy."""
        try:
            return request("GET", f"{self.url}/health", timeout=(2.0, 1.0)).status_code == 200
        except requests.RequestException:
            return False

    def _is_ours(self, info: Mapping[str, Any]) -> bool:
        return info.get("server") == self.SERVER

    def _check_base(self, info: Mapping[str, Any]) -> None:
        if self._base_hash and info["base_hash"] != self._base_hash:
            raise TargetError(
                f"{self.url}: serves base model {info['base_hash'][:12]} ({info['model_id']}),"
                f" expected {self._base_hash[:12]}"
            )

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
            process.start(server, ready=self.is_healthy, timeout=timeout)
        return True

    def placements(self, bundle_id: str) -> dict[str, str]:
        """User -> the id a request asks for, of a staged bundle, where that is not the user's name."""
        return {}

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

    def activate(self, bundle_id: str, *, instead_of: str = "") -> None:
        """Switch plain user names over to this bundle. TargetError if the server does not hold it.

        TargetError also where another bundle is active than `instead_of`, if that is given.
        """
        only = f"?instead_of={instead_of}" if instead_of else ""
        self._admin("POST", f"bundles/{bundle_id}/activate{only}")

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
        """Greedy text after `prompt` with the adapter of that id, "" for none. TargetError if refused."""
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
        expected: Mapping[str, Trace] | None = None,
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
            expected: user -> what the adapter answers elsewhere; an answer that is not close to it fails.
            workers: canaries under way at once.

        Raises:
            TargetError: the base model itself does not answer.
        """

        def ask(adapter_id: str) -> Answered:
            return self._read(self._patiently(prompt, adapter_id, max_new_tokens))

        base = ask("")
        if base.refusal:
            raise TargetError(f"{self.url}: the base model does not answer: {base.refusal}")
        ids = self._asked_as(users, bundle_id)
        with ThreadPoolExecutor(workers) as pool:
            answers = list(pool.map(ask, ids))
        faults = []
        for user, asked_as, answer in zip(users, ids, answers, strict=True):
            base_trace = None if user in zero_users else base.trace
            if base_trace is not None and is_close(answer.trace, base_trace):
                answer = ask(asked_as)
            due = Due(asked_as, self._version(bundle_id), base_trace, (expected or {}).get(user))
            faults.append(fault(answer, due))
        return faults

    def _asked_as(self, users: Sequence[str], bundle_id: str) -> list[str]:
        """The ids that ask for users in a staged bundle, whether it is active or not."""
        return [f"{user}@{bundle_id}" for user in users]

    def _version(self, bundle_id: str) -> str:
        """What an answer out of a bundle has to say about its version."""
        return bundle_id

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
        return body(self.admin(method, path, data=data))

    def admin(self, method: str, path: str, *, data: IO[bytes] | bytes | None = None) -> requests.Response:
        """A request to a route under /soppu/v1. TargetError where it is not answered, or refused."""
        token = self._token or tokens.read(self._token_file)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"{self.url}/soppu/v1/{path}"
        try:
            response = request(method, url, data=data, headers=headers, timeout=self._timeout)
        except requests.RequestException as error:
            raise TargetError(f"{method} {url}: no answer: {error}") from error
        if response.status_code >= 300:
            raise TargetError(f"{method} {url}: {refusal(response)}")
        return response


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
