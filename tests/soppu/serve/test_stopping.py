"""A server that is told to stop while it works: what is finished, what is refused, and in which words."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from soppu import adapter
from soppu.federation.simulation import free_port
from soppu.serve import stopping
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.port import claim_port
from soppu.serve.stopping import DrainingServer
from tests.soppu.serve import tiny

ADMIN = {"authorization": "Bearer t"}
BODY = {"inputs": "the quick", "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}


@dataclass
class Held:
    """A server whose model waits at its second token until `go` is set."""

    server: DrainingServer
    engine: Engine
    state: ServerState
    thread: threading.Thread
    url: str
    inside: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, requests_: int) -> None:
        """Until so many requests are with the engine, and the model waits."""
        assert self.inside.wait(30)
        deadline = time.monotonic() + 30
        while self.engine.waiting + self.engine.running < requests_:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def held(folder: Path, *, grace: float) -> Iterator[Held]:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    state = ServerState.open(folder, bank)
    engine = Engine(model, tiny.tokenizer(), bank, EngineOptions())
    app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH, admin_token="t"), state=state)
    server = DrainingServer(app, engine, grace=grace)
    with claim_port("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        held = Held(server, engine, state, thread, f"http://127.0.0.1:{listener.getsockname()[1]}")
        steps = iter(range(1000))

        def wait(*_: object) -> None:
            if next(steps):
                held.inside.set()
                held.go.wait(30)

        model.lm_head.register_forward_hook(wait)
        thread.start()
        try:
            yield held
        finally:
            held.go.set()
            server.stop()
            thread.join(30)
            state.close()


def ask(url: str, path: str = "/generate") -> requests.Response:
    return requests.post(f"{url}{path}", json=BODY, timeout=60)


def wait_until_refused(url: str) -> requests.Response:
    deadline = time.monotonic() + 30
    while (answer := requests.get(f"{url}/health", timeout=5)).status_code == 200:
        assert time.monotonic() < deadline
    return answer


def test_what_was_begun_is_finished_and_what_comes_is_told_to_come_again(tmp_path: Path) -> None:
    with held(tmp_path / "state", grace=60) as on, ThreadPoolExecutor(2) as pool:
        plain, stream = pool.submit(ask, on.url), pool.submit(ask, on.url, "/generate_stream")
        on.wait_for(2)
        on.server.stop()
        assert int(wait_until_refused(on.url).headers["retry-after"]) > 0
        for path in ("/generate", "/generate_stream", "/"):
            refused = ask(on.url, path)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error_type"] == "overloaded"
        chat = {"model": "", "prompt": "x"}
        assert requests.post(f"{on.url}/v1/completions", json=chat, timeout=30).status_code == 503
        on.go.set()
        assert plain.result().status_code == 200 and plain.result().json()["generated_text"]
        last = json.loads(stream.result().text.strip().rsplit("data: ", 1)[1])
        assert last["generated_text"] == plain.result().json()["generated_text"]
        on.thread.join(30)
        assert not on.thread.is_alive()
        with pytest.raises(requests.ConnectionError):
            ask(on.url)


@pytest.mark.parametrize("told", ["after its grace", "by a second signal"])
def test_what_takes_too_long_ends_with_an_error_in_its_own_form(tmp_path: Path, told: str) -> None:
    grace = 0.2 if told == "after its grace" else 60.0
    with held(tmp_path / "state", grace=grace) as on, ThreadPoolExecutor(3) as pool:
        plain = pool.submit(ask, on.url)
        stream = pool.submit(ask, on.url, "/generate_stream")
        completion = {"model": "", "prompt": "the quick", "max_tokens": 8, "stream": True}
        openai = pool.submit(requests.post, f"{on.url}/v1/completions", json=completion, timeout=60)
        on.wait_for(3)
        on.server.stop()
        wait_until_refused(on.url)
        if grace == 60.0:
            on.server.stop()
        threading.Timer(0.5, on.go.set).start()
        answer = plain.result()
        assert answer.status_code == 500 and answer.json()["error_type"] == "incomplete_generation"
        for streamed in (stream.result(), openai.result()):
            if streamed.status_code == 200:
                lines = streamed.text.strip().split("\n\n")
                assert json.loads(lines[-1].removeprefix("data: "))["error_type"] == "incomplete_generation"
            else:
                assert streamed.json()["error_type"] == "incomplete_generation"
        on.thread.join(30)
        assert not on.thread.is_alive()


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An adapter as it is put."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter.write(tiny.lora(tiny.llama(), seed=1), folder / "alice")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted((folder / "alice").iterdir()):
            tar.add(path, path.name)
    return stream.getvalue()


def put(url: str, body: bytes, name: str = "alice") -> requests.Response:
    return requests.put(f"{url}/soppu/v1/adapters/{name}", data=body, headers=ADMIN, timeout=60)


def loading(on: Held) -> threading.Event:
    """Set once an upload is being loaded, which then waits until `go` is set."""
    inside, load = threading.Event(), on.state.add_adapter

    def wait(name: str, folder: Path) -> None:
        inside.set()
        on.go.wait(30)
        load(name, folder)

    on.state.add_adapter = wait  # type: ignore[method-assign]
    return inside


def half_sent(url: str, method: str, path: str) -> socket.socket:
    """A connection with a request whose body never ends."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    lines = [f"{method} {path} HTTP/1.1", "host: x", "authorization: Bearer t", "content-length: 100000"]
    connection.sendall("\r\n".join([*lines, "content-type: application/json", "", "half"]).encode())
    return connection


def test_a_change_that_was_begun_is_finished_and_no_other_is_begun(tmp_path: Path, upload: bytes) -> None:
    with held(tmp_path / "state", grace=60) as on, ThreadPoolExecutor(1) as pool:
        inside = loading(on)
        begun = pool.submit(put, on.url, upload)
        assert inside.wait(30)
        on.server.stop()
        wait_until_refused(on.url)
        for refused in (
            put(on.url, upload, "bob"),
            requests.post(f"{on.url}/soppu/v1/deactivate", timeout=30),
        ):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error_type"] == "overloaded"
        assert requests.get(f"{on.url}/soppu/v1/adapters", headers=ADMIN, timeout=30).status_code == 200
        on.go.set()
        assert begun.result().status_code == 201
        on.thread.join(30)
        assert not on.thread.is_alive() and not on.server.gave_up
    kept = json.loads((tmp_path / "state" / "state.json").read_text())
    assert list(kept["adapters"]) == ["alice"]


@pytest.mark.parametrize("told", ["after its grace", "by a second signal"])
def test_what_is_still_sent_or_loaded_is_answered_and_given_up(
    told: str,
    tmp_path: Path,
    upload: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stopping, "_FLUSH_SECONDS", 0.5)
    grace = 0.2 if told == "after its grace" else 60.0
    with held(tmp_path / "state", grace=grace) as on, ThreadPoolExecutor(1) as pool:
        inside = loading(on)
        half = [
            half_sent(on.url, "PUT", "/soppu/v1/adapters/bob"),
            half_sent(on.url, "PUT", f"/soppu/v1/bundles/{'0' * 64}"),
            half_sent(on.url, "POST", "/generate"),
        ]
        loaded = pool.submit(put, on.url, upload)
        assert inside.wait(30)
        on.server.stop()
        wait_until_refused(on.url)
        if grace == 60.0:
            on.server.stop()
        on.thread.join(30)
        assert not on.thread.is_alive() and on.server.gave_up
        answer = loaded.result()
        assert answer.status_code == 503 and answer.json()["error_type"] == "overloaded"
        for connection in half:
            with connection:
                said = b"".join(iter(lambda: connection.recv(65536), b"")).decode()  # noqa: B023
            assert said.startswith("HTTP/1.1 503 ") and "retry-after" in said and "overloaded" in said
        assert not list(on.state.incoming.iterdir())
        assert not caplog.records


@pytest.mark.slow
@pytest.mark.long
def test_a_load_that_has_no_end_does_not_keep_the_process(tmp_path: Path, upload: bytes) -> None:
    tiny.base(tmp_path / "base")
    endless = "import threading\nfrom soppu.serve.bank.store import ServerState\nfrom soppu.cli import main\n"
    endless += "ServerState.add_adapter = lambda *_, **__: (print('loads'), threading.Event().wait())\nmain()"
    words = ["serve", "--model", tmp_path / "base", "--state", tmp_path / "state", "--grace", "0"]
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", endless, *map(str, words), "--port", str(port)],
        env=os.environ | {"SOPPU_ADMIN_TOKEN": "t"},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
    )
    with ThreadPoolExecutor(1) as pool:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None
                time.sleep(0.1)
        answer = pool.submit(put, f"http://127.0.0.1:{port}", upload)
        assert server.stdout is not None and server.stdout.readline() == "loads\n"
        server.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 503
        assert server.wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and log.splitlines()[-1].endswith("stopped")
