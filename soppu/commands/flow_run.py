"""One flow run of Prefect, over its HTTP API: started, and asked about beside whoever shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import click
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from soppu.progress.events import DONE, FAILED
from soppu.progress.followed import Followed

RUN_ARTIFACT = "soppu-run"  # a link to the run's folder, which the first task makes
_ASK_S, _TIMEOUT_S = 1.0, 10.0
# Prefect answers 503 while its SQLite is locked, as its own client expects it to
_BUSY = Retry(
    total=6,
    connect=0,
    read=0,
    status_forcelist=(429, 502, 503),
    allowed_methods=None,
    backoff_factor=0.3,
    raise_on_status=False,
)
_BAD_ENDS = ("FAILED", "CRASHED", "CANCELLED")


def submit(api: str, deployment: str, parameters: Mapping[str, Any]) -> FlowRun:
    """Start a deployment.

    A server that says it is busy is asked again for a few seconds; that never starts a second run.

    Raises:
        click.ClickException: nobody answers at `api`, it is no Prefect server, or has no such deployment.
    """
    patient = requests.Session()
    for scheme in ("http://", "https://"):
        patient.mount(scheme, HTTPAdapter(max_retries=_BUSY))
    try:
        found = patient.get(f"{api}/deployments/name/{deployment}", timeout=_TIMEOUT_S)
        if found.status_code == 404:
            raise click.ClickException(
                f"{api}: has no deployment {deployment!r}; `make up` makes soppu/full-pipeline and"
                " soppu-recompress/nightly"
            )
        found.raise_for_status()
        path = f"{api}/deployments/{found.json()['id']}/create_flow_run"
        asked: dict[str, Any] = {"parameters": dict(parameters), "idempotency_key": uuid4().hex}
        made = patient.post(path, json=asked, timeout=_TIMEOUT_S)
        made.raise_for_status()
        return FlowRun(api, made.json())
    except requests.ConnectionError:
        raise click.ClickException(
            f"{api}: no Prefect server answers; `make up` starts one, PREFECT_API_URL names it;"
            " with --here the run does without"
        ) from None
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{api}: answers, but not as a Prefect server: {error}") from None


class FlowRun:
    """A flow run, asked about once a second in a thread of its own: nobody waits for a server that is away.

    Args:
        api: URL of Prefect's API.
        made: what the API said as it was made.
    """

    def __init__(self, api: str, made: Mapping[str, Any]) -> None:
        self.id, self.name = str(made["id"]), str(made.get("name", ""))
        self._api, self._pool = api, made.get("work_pool_name")
        self._state: Mapping[str, Any] = made.get("state") or {}
        self._folder: Path | None = None
        self._followed: Followed | None = None
        self._workers = True
        threading.Thread(target=self._ask_on, daemon=True).start()

    @property
    def folder(self) -> Path | None:
        """The run's folder, once the flow has found out."""
        return self._folder

    def look(self) -> Followed | None:
        """What follows the run's folder, once there is one on this machine."""
        if self._followed is None and self._folder and self._folder.is_dir():
            self._followed = Followed(self._folder, of=self.id)
        return self._followed

    def over(self) -> tuple[str, str]:
        """How Prefect says that it has ended: "done", or "failed" and why; empty strings while it goes on."""
        kind, message = self._state.get("type"), str(self._state.get("message") or "Prefect gives no reason")
        if kind == "COMPLETED":
            return DONE, ""
        return (FAILED, f"{kind.lower()}: {message}") if kind in _BAD_ENDS else ("", "")

    def waiting(self) -> str:
        """What to say of it as long as its stages say nothing."""
        kind = self._state.get("type")
        if kind in ("SCHEDULED", "PENDING") and not self._workers:
            return f"waiting: no worker of pool {self._pool!r} is online; `make up` starts one"
        if kind in ("SCHEDULED", "PENDING"):
            return "waiting for a worker"
        if self._folder and not self._folder.is_dir():
            return f"runs in {self._folder}, which is not on this machine: its end is all that is told here"
        return "reading configuration, model and text"

    def _ask_on(self) -> None:
        while not self.over()[0]:
            # the server is away for a while: the next question may hear more
            with suppress(requests.RequestException, ValueError, KeyError, TypeError):
                self._ask()
            time.sleep(_ASK_S)

    def _ask(self) -> None:
        found = requests.get(f"{self._api}/flow_runs/{self.id}", timeout=_TIMEOUT_S).json()
        if self._folder is None:
            asked = {"artifacts": {"flow_run_id": {"any_": [self.id]}, "key": {"any_": [RUN_ARTIFACT]}}}
            made = requests.post(f"{self._api}/artifacts/filter", json=asked, timeout=_TIMEOUT_S).json()
            self._folder = next((_folder(item["data"]) for item in made), None)
        self._state = found["state"]
        if self._folder is None and self._pool:
            url = f"{self._api}/work_pools/{self._pool}/workers/filter"
            workers = requests.post(url, json={}, timeout=_TIMEOUT_S).json()
            self._workers = any(item["status"] == "ONLINE" for item in workers)


def _folder(link: str) -> Path:
    """The path in a Markdown link with a file's URL."""
    return Path(unquote(urlsplit(link[link.index("(") + 1 : link.rindex(")")]).path))
