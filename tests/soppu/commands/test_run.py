"""`soppu run` in this process: a run of its own here, and one of a Prefect that is asked over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.commands import flow_run, following
from soppu.commands.flow_run import FlowRun, submit
from soppu.commands.run_here import HereRun
from soppu.federation.simulation import free_port
from soppu.progress.events import BEGAN, DONE, FAILED, RUN, append
from tests.soppu.progress.recorded import event

FLOW = "soppu/full-pipeline"


class Api:
    """Prefect's API as far as the command asks it: what is in `state`, `folder` and `workers` is answered."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"type": "SCHEDULED"}
        self.folder, self.workers = "", ["OFFLINE"]
        self.parameters: dict[str, Any] = {}
        self.busy, self.keys = 0, list[str]()  # so many more requests are answered 503

    def answer(self, path: str, body: Any) -> Any:
        if path == f"/api/deployments/name/{FLOW}":
            return {"id": "d-1"}
        if path == "/api/deployments/d-1/create_flow_run":
            self.parameters = body["parameters"]
            return {"id": "f-1", "name": "wise-owl", "work_pool_name": "soppu", "state": self.state}
        if path == "/api/flow_runs/f-1":
            return {"state": self.state}
        if path == "/api/artifacts/filter":
            return [{"data": f"[run](file://{self.folder})"}] if self.folder else []
        if path == "/api/work_pools/soppu/workers/filter":
            return [{"status": status} for status in self.workers]
        return "nothing of ours" if path == f"/api/deployments/name/{FLOW}-else" else None


def until(said: Callable[[], Any], wanted: Any) -> None:
    """Wait until what is asked about in another thread is known here."""
    end = time.monotonic() + 10
    while (found := said()) != wanted and time.monotonic() < end:
        time.sleep(0.005)
    assert found == wanted


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Api]]:
    monkeypatch.setattr(flow_run, "_ASK_S", 0.01)
    monkeypatch.setattr(following, "_LOOK_S", 0.01)
    told = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "0")
            if self.command == "POST" and body and "idempotency_key" in body:
                told.keys.append(body["idempotency_key"])
            busy, told.busy = told.busy > 0, max(0, told.busy - 1)
            found = None if busy else told.answer(self.path, body)
            self.send_response(503 if busy else 200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api", told
    told.state = {"type": "COMPLETED"}  # who still asks stops
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_is_waited_for_and_its_folder_is_found_by_what_the_flow_says(
    api: tuple[str, Api], tmp_path: Path
) -> None:
    url, told = api
    run = submit(url, FLOW, {"config": "x.toml"})
    assert (run.id, run.name, told.parameters) == ("f-1", "wise-owl", {"config": "x.toml"})
    until(run.waiting, "waiting: no worker of pool 'soppu' is online; `make up` starts one")
    told.workers = ["OFFLINE", "ONLINE"]
    until(run.waiting, "waiting for a worker")
    assert run.look() is None and run.folder is None
    folder = tmp_path / "a run"
    told.state, told.folder = {"type": "RUNNING"}, str(folder).replace(" ", "%20")
    until(run.waiting, f"runs in {folder}, which is not on this machine: its end is all that is told here")
    folder.mkdir()
    followed = run.look()
    assert run.folder == folder and followed is not None and run.look() is followed
    assert run.waiting() == "reading configuration, model and text" and run.over() == ("", "")
    told.state = {"type": "CRASHED", "message": "no memory"}
    until(run.over, (FAILED, "crashed: no memory"))


@pytest.mark.parametrize(
    ("state", "over"),
    [
        ({"type": "COMPLETED"}, (DONE, "")),
        ({"type": "CANCELLED"}, (FAILED, "cancelled: Prefect gives no reason")),
        ({"type": "FAILED", "message": "x"}, (FAILED, "failed: x")),
        ({"type": "RUNNING"}, ("", "")),
    ],
)
def test_how_prefect_says_that_a_run_has_ended(
    state: dict[str, str], over: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowRun, "_ask_on", lambda self: None)
    assert FlowRun("http://nowhere", {"id": 1, "state": state}).over() == over


def test_what_is_no_prefect_or_has_no_such_flow_is_named(api: tuple[str, Api]) -> None:
    url, _ = api
    away = f"http://127.0.0.1:{free_port()}/api"
    for where, flow, said in (
        (away, FLOW, f"{away}: no Prefect server answers; `make up` starts one"),
        (url, "soppu/other", f"{url}: has no deployment 'soppu/other'"),
        (url, f"{FLOW}-else", f"{url}: answers, but not as a Prefect server"),
    ):
        with pytest.raises(click.ClickException) as refused:
            submit(where, flow, {})
        assert said in refused.value.message


def test_a_server_that_is_busy_is_asked_again_and_starts_one_run(
    api: tuple[str, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, told = api
    monkeypatch.setattr(flow_run, "_BUSY", flow_run._BUSY.new(backoff_factor=0.001))
    post = told.answer

    def answer(path: str, body: Any) -> Any:
        if path.endswith(FLOW):
            told.busy = 3  # from now on, three times
        return post(path, body)

    monkeypatch.setattr(told, "answer", answer)
    assert submit(url, FLOW, {"config": "x.toml"}).id == "f-1"
    assert len(told.keys) == 4 and len(set(told.keys)) == 1  # by which Prefect knows the run again
    told.state = {"type": "COMPLETED"}
    told.busy = 10**6
    with pytest.raises(click.ClickException, match="answers, but not as a Prefect server: 503"):
        submit(url, FLOW, {})


def test_the_command_shows_the_flow_run_and_ends_as_it(
    api: tuple[str, Api], config_file: Path, tmp_path: Path
) -> None:
    url, told = api
    told.state, told.folder = {"type": "RUNNING"}, str(tmp_path)
    for one in (event(0, RUN, BEGAN, stages=("collect",), of="f-1"), event(9, RUN, DONE, seconds=9.0)):
        append(tmp_path, one)
    words = ["run", "--config", str(config_file), "--api", f"{url}/", "--set", "seed=7"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-2:] == ["run: collect", "run: done in 9 s"]
    assert told.parameters == {"config": str(config_file), "overrides": {"seed": 7}}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(f'runs = "{tmp_path / "runs"}"\n')
    return path


def ended(run: HereRun) -> tuple[str, str]:
    run._process.wait(10)
    return run.over()


def test_a_run_here_is_a_process_whose_last_word_is_its_error(
    python: Callable[[str], None], config_file: Path, tmp_path: Path
) -> None:
    python('echo "$2 $3 $4 of $5" >&2; echo ConfigError: no >&2; exit 1')
    run = HereRun(config_file, {"seed": 7}, runs=tmp_path / "runs")
    assert run.waiting() == "reading configuration, model and text" and run.look() is None
    assert ended(run) == (FAILED, f"ConfigError: no ({run.log})")
    said = run.log.read_text().splitlines()[0]
    assert said == f'soppu.stages.pipeline {config_file} {{"seed": 7}} of {run.id}'
    python("exit 4")
    silent = HereRun(config_file, {}, runs=tmp_path / "runs")
    assert ended(silent) == (FAILED, f"exit code 4 ({silent.log})")
    python("exit 0")
    assert ended(HereRun(config_file, {}, runs=tmp_path / "runs")) == (DONE, "")


def test_a_run_here_is_followed_in_the_folder_that_is_its_own(
    python: Callable[[str], None], config_file: Path, tmp_path: Path
) -> None:
    python("exit 0")
    run = HereRun(config_file, {}, runs=tmp_path / "runs")
    for name, of in (("other-1", "somebody"), ("mine-2", run.id)):
        (tmp_path / "runs" / name).mkdir()
        append(tmp_path / "runs" / name, event(0, RUN, BEGAN, stages=("collect",), of=of))
    (tmp_path / "runs" / "latest").symlink_to("other-1")
    assert run.folder is None and run.look() is run.look()
    assert run.folder == tmp_path / "runs" / "mine-2"
    ended(run)


def test_the_command_runs_here_and_says_how_it_failed(
    python: Callable[[str], None], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOOK_S", 0.01)
    python("echo DataError: no text >&2; exit 1")
    done = CliRunner().invoke(main, ["run", "--here", "--config", str(config_file)])
    assert done.exit_code == 1 and "the run has failed: DataError: no text (" in done.stderr
    wrong = CliRunner().invoke(main, ["run", "--here", "--config", str(config_file), "--set", "sed=1"])
    assert wrong.exit_code == 1 and "sed" in wrong.stderr and "the run has" not in wrong.stderr
