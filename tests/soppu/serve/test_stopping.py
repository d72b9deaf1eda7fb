"""A server that is told to stop while it works: what is finished, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from soppu.federation.simulation import free_port
from soppu.serve import stopping
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.server import claim_port
from soppu.serve.stopping import DrainingServer
from tests.soppu.serve import tiny
from tests.soppu.serve.talking import tar_of

BODY = {"inputs": "the quick", "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}


@dataclass
class Held:
    """A server whose model waits at its second token until `go` is set."""

    server: DrainingServer
    engine: Engine
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
        held = Held(server, engine, thread, f"http://127.0.0.1:{listener.getsockname()[1]}")
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
