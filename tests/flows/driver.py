"""Drives the pipeline the way a user does: the `prefect` command and Prefect's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from deploy.stack import ROOT, Stack
from tests.terminal import Terminal

_SOPPU = Path(sys.executable).parent / "soppu"


@dataclass
class Pipeline:
    """Starts flow runs the way a user does, and looks at what became of them."""

    stack: Stack
    folder: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """What a flow run is started with."""
        return {"config": str(ROOT / "configs" / "tiny.toml"), "overrides": self.overrides}

    def submit(self, deployment: str) -> str:
        """Start a flow run through the API; returns its id."""
        deployment_id = self.api(f"deployments/name/{deployment}")["id"]
        path = f"deployments/{deployment_id}/create_flow_run"
        return str(self.api(path, {"parameters": self.parameters})["id"])

    def start(self, deployment: str) -> str:
        """Start a flow run with `prefect deployment run`; returns its id."""
        values = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in self.parameters.items()
        }
        parameters = [word for name, value in values.items() for word in ("--param", f"{name}={value}")]
        out = self.prefect("deployment", "run", deployment, *parameters)
        return next(
            word for line in out.splitlines() if "UUID" in line for word in line.split() if "-" in word
        )

    def run(self, *options: str) -> Terminal:
        """Start the pipeline with `soppu run`, as `make demo` does, on a terminal."""
        given = [f"{name}={json.dumps(value)}" for name, value in self.parameters["overrides"].items()]
        sets = [word for one in given for word in ("--set", one)]
        words = ["--api", self.stack.api, "--config", self.parameters["config"], *sets, *options]
        return Terminal(_SOPPU, "run", *words, size=(40, 160))

    def watch(self, folder: Path) -> Terminal:
        """`soppu watch` on a terminal."""
        return Terminal(_SOPPU, "watch", folder, size=(40, 160))

    def prefect(self, *arguments: str) -> str:
        """Run the real `prefect` command against this stack."""
        environment = {**os.environ, **self.stack.environment, "COLUMNS": "200", "NO_COLOR": "1"}
        command = [str(Path(sys.executable).parent / "prefect"), *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's API: POST with a body, else GET; again while its database is busy."""
        again = Retry(total=6, backoff_factor=0.5, status_forcelist=[503], allowed_methods=None)
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=again))
            url, method = f"{self.stack.api}/{path}", "GET" if body is None else "POST"
            answer = session.request(method, url, json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def wait(self, flow_run: str, *, timeout: float = 600) -> dict[str, Any]:
        """The flow run once it has ended."""
        ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        return until(
            lambda: (run := self.api(f"flow_runs/{flow_run}"))["state_type"] in ended and run, timeout=timeout
        )

    def completed(self, flow_run: str) -> None:
        """Wait for the end of a flow run, which has to be a good one."""
        ended = self.wait(flow_run)
        assert ended["state_type"] == "COMPLETED", self.logs(flow_run)

    def task_runs(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """Task runs of a flow run and of the recompression it calls, by task name."""
        own = self.api("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [flow_run]}}})
        children = self.api("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}})
        for child in children:
            own += self.api("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [child["id"]]}}})
        return {item["name"].rsplit("-", 1)[0]: item for item in own}

    def logs(self, flow_run: str) -> str:
        """Messages of a flow run, for a failing test."""
        found = self.api("logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
        return "\n".join(item["message"] for item in found)

    def run_folder(self) -> Path:
        """The only run folder there is."""
        (folder,) = self.run_folders()
        return folder

    def run_folders(self) -> set[Path]:
        """All run folders; none before the first run."""
        found = (self.folder / "runs").glob("[!.]*")
        return {path for path in found if not path.is_symlink()}


def until(condition: Callable[[], Any], *, timeout: float, every: float = 0.2) -> Any:
    """Poll until the condition gives something true; that is returned."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {timeout} s: {condition}")
