"""Publishing to a real server, starting and stopping one, and what is said when something else is there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread, Timer

import pytest
import requests
import torch
from click.testing import CliRunner

from soppu.cli import main
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import PortTaken, TargetError
from soppu.federation.simulation import free_port
from soppu.models import resolve
from soppu.serve.admin_token import token_file
from soppu.serve.api.http import ServerInfo
from soppu.serve.port import claim_port
from soppu.targets import http, process
from soppu.targets.canary import Answered, Due, fault, is_close
from soppu.targets.embedded import EmbeddedTarget, ServerLaunch
from tests.latecomer import latecomer
from tests.soppu.serve import tiny

PROMPT = "the quick"


@pytest.fixture(scope="module")
def shared() -> Bundle:
    model = tiny.llama()
    return tiny.bundle({name: tiny.lora(model, seed=seed) for seed, name in enumerate(("alice", "žofie"), 1)})


@pytest.fixture(scope="module")
def files(shared: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundle id -> file: the bundle, and one that holds alice only."""
    folder = tmp_path_factory.mktemp("bundles")
    model = tiny.llama()
    other = tiny.bundle({"alice": tiny.lora(model, seed=9)})
    return {bundle.save(folder / name): folder / name for name, bundle in (("one", shared), ("two", other))}


@pytest.fixture
def target(tmp_path: Path) -> Iterator[EmbeddedTarget]:
    with tiny.served(tiny.llama(), tmp_path / "state", token="secret") as url:
        yield EmbeddedTarget(url, base_hash=tiny.BASE_HASH, admin_token="secret")


def test_a_bundle_is_published_tried_activated_and_rolled_back(
    target: EmbeddedTarget, shared: Bundle, files: dict[str, Path]
) -> None:
    (one, two), users = files, list(shared.users)
    assert target.is_up() and target.active() == ""
    assert target.publish(files[one], bundle_id=one)
    assert not target.publish(files[one], bundle_id=one)
    assert target.active() == ""
    for workers in (1, 4):
        assert target.canary(users, PROMPT, bundle_id=one, workers=workers) == [""] * len(users)
    target.activate(one)
    expected = tiny.peft_text(tiny.llama(), PROMPT, shared.reconstruct("alice"), tokens=8)
    assert target.complete(PROMPT, user="alice", max_new_tokens=8) == expected
    assert target.complete(PROMPT, max_new_tokens=8) == tiny.peft_text(tiny.llama(), PROMPT, None, tokens=8)
    target.publish(files[two], bundle_id=two)
    target.activate(two)
    assert target.active() == two and set(target.bundles()) == {one, two}
    target.rollback(one)
    assert target.active() == one
    target.drop(two)
    assert target.bundles() == (one,)
    target.rollback("")
    assert target.active() == ""


def test_a_canary_without_effect_fails_unless_it_is_known_to_be_empty(
    target: EmbeddedTarget, shared: Bundle, tmp_path: Path
) -> None:
    norm = shared.norm * torch.tensor([1.0, 0.0])
    bundle_id = replace(shared, norm=norm).save(tmp_path / "zero")
    target.publish(tmp_path / "zero", bundle_id=bundle_id)
    for workers in (1, 8):
        faults = target.canary(["alice", "žofie", "nobody"], PROMPT, bundle_id=bundle_id, workers=workers)
        assert faults[0] == ""
        assert "the adapter has no effect" in faults[1]
        assert faults[2].startswith("HTTP 424: ") and "'nobody'" in faults[2]
    assert target.canary(["žofie"], PROMPT, bundle_id=bundle_id, zero_users={"žofie"}) == [""]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[str, Event]]:
    """URL of a server whose only row and only place in the queue are taken until the event is set."""
    gate, inside, model = Event(), Event(), tiny.llama()
    model.lm_head.register_forward_hook(lambda *_: (inside.set(), gate.wait(30), None)[-1])
    with tiny.served(model, tmp_path / "state", max_batch=1, max_queue=1) as url:
        target = EmbeddedTarget(url, admin_token=tiny.TOKEN)
        with ThreadPoolExecutor(2) as pool:
            pool.submit(target.complete, PROMPT, max_new_tokens=2)
            assert inside.wait(30)
            pool.submit(target.complete, PROMPT, max_new_tokens=2)
            while requests.get(f"{url}/info", timeout=5).json()["waiting"] < 1:
                time.sleep(0.01)
            yield url, gate
            gate.set()


def test_a_canary_waits_for_a_full_server(
    full: tuple[str, Event], shared: Bundle, files: dict[str, Path]
) -> None:
    url, gate = full
    target, one = EmbeddedTarget(url, admin_token=tiny.TOKEN), next(iter(files))
    target.publish(files[one], bundle_id=one)
    Timer(0.3, gate.set).start()
    assert target.canary(shared.users * 4, PROMPT, bundle_id=one, workers=8) == [""] * 8


def test_a_canary_does_not_wait_for_ever(full: tuple[str, Event]) -> None:
    with pytest.raises(TargetError, match="HTTP 429: Model is overloaded"):
        EmbeddedTarget(full[0], timeout=0.5).canary(["alice"], PROMPT, bundle_id="1" * 64)


def test_every_fault_of_an_answer_is_named() -> None:
    base, good = ((1, -0.5),), Answered("", "alice@v", "v", ((2, -0.25),))
    due = Due("alice@v", "v", base, expected=((2, -0.3),))

    def said(**changes: object) -> str:
        return fault(replace(good, **changes), due)  # type: ignore[arg-type]

    assert said() == ""
    assert "served by 'bob@v'" in said(adapter_id="bob@v")
    assert "of 'w'" in said(version="w")
    assert said(trace=()) == "no tokens came back"
    assert "not finite" in said(trace=((2, float("nan")),))
    assert "no effect" in said(trace=base)
    assert fault(replace(good, trace=base), Due("alice@v", "v")) == ""
    assert "tokens [3], the adapter gives [2] here" in said(trace=((3, -1.5),))
    assert "tokens [2], the adapter gives [2] here" in said(trace=((2, -0.9),))
    assert said(refusal="HTTP 500: x") == "HTTP 500: x"


def test_what_rounding_may_have_done_is_close_and_nothing_else() -> None:
    base = ((1, -0.5), (2, -1.0), (3, -2.0))
    assert is_close(base, base) and is_close(((1, -0.6), (2, -0.8), (3, -2.1)), base)
    assert is_close(((1, -0.5), (7, -1.1), (8, -9.0)), base)  # a tie that went the other way
    assert not is_close(((7, -1.5), (2, -1.0), (3, -2.0)), base)
    assert not is_close(((1, -0.5), (2, -1.6), (3, -2.0)), base)
    assert not is_close(base[:2], base)


def test_refusals_say_what_the_server_said(target: EmbeddedTarget, files: dict[str, Path]) -> None:
    one = next(iter(files))
    with pytest.raises(TargetError, match="HTTP 404: bundle .* is not loaded"):
        target.activate(one)
    with pytest.raises(TargetError, match="HTTP 422: the body has SHA-256"):
        target.publish(files[one], bundle_id="0" * 64)
    with pytest.raises(TargetError, match="HTTP 424: .*'nobody' is not served here"):
        target.complete(PROMPT, user="nobody")
    with pytest.raises(TargetError, match="HTTP 401: an admin token is needed"):
        EmbeddedTarget(target.url, admin_token="wrong").active()
    with pytest.raises(TargetError, match="HTTP 422: .*`inputs` cannot be empty"):
        target.canary(["alice"], "", bundle_id=one)


def test_a_server_of_another_base_is_refused(target: EmbeddedTarget, tmp_path: Path) -> None:
    other = EmbeddedTarget(target.url, base_hash="c" * 64)
    with pytest.raises(TargetError, match=r"serves base model bbbbbbbbbbbb \(tiny\), expected cccccccccccc"):
        other.is_up()
    with pytest.raises(TargetError, match="expected cccccccccccc"):
        other.start(launch(tmp_path, "unused"))


def test_nothing_listening_is_not_up() -> None:
    target = EmbeddedTarget(f"http://127.0.0.1:{free_port()}")
    assert target.is_up() is False
    with pytest.raises(TargetError, match="no answer"):
        target.active()
    with pytest.raises(TargetError, match="no answer"):
        target.complete(PROMPT)


class Stranger(BaseHTTPRequestHandler):
    server_version = "stranger/1.0"

    def do_GET(self) -> None:
        body = json.dumps({"server": "else"}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_port_of_somebody_else_is_named_and_nothing_is_started(stranger: int, tmp_path: Path) -> None:
    target = EmbeddedTarget(f"http://127.0.0.1:{stranger}")
    with pytest.raises(PortTaken, match="no SOPPU server: GET /info gave HTTP 200 from 'stranger/1.0"):
        target.is_up()
    with pytest.raises(PortTaken):
        target.start(launch(tmp_path, "unused"))
    assert [path.name for path in tmp_path.iterdir()] == ["server.pid.lock"]


def test_a_port_that_does_not_speak_http_is_taken_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(PortTaken, match="something listens, but is no SOPPU server"):
            EmbeddedTarget(f"http://127.0.0.1:{listener.getsockname()[1]}").is_up()


def test_a_server_that_comes_up_just_after_the_look_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with latecomer(http.request, port) as look:
        monkeypatch.setattr(http, "request", look)
        assert not EmbeddedTarget(f"http://127.0.0.1:{port}").is_up()


def test_a_port_is_claimed_once_before_anything_is_loaded() -> None:
    with claim_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTaken, match=f"cannot listen on 127.0.0.1:{port}"):
            claim_port("127.0.0.1", port)


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    target: EmbeddedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert target.is_up() and target.active() == ""


def test_the_command_refuses_a_taken_port_before_it_looks_at_the_model(stranger: int, tmp_path: Path) -> None:
    arguments = ["serve", "--model", str(tmp_path / "absent"), "--state", str(tmp_path / "state")]
    result = CliRunner().invoke(main, [*arguments, "--port", str(stranger)])
    assert result.exit_code == 1
    assert result.output == f"Error: cannot listen on 127.0.0.1:{stranger}: Address already in use\n"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("value", ["alice", "=dir", "alice="])
def test_the_command_wants_names_with_folders(value: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--adapter", value])
    assert result.exit_code == 2 and "is not NAME=DIR" in result.output


def launch(folder: Path, model: str, *, timeout: float = 120.0) -> ServerLaunch:
    return ServerLaunch(
        model=model,
        cache=folder / "cache",
        state=folder / "state",
        log=folder / "server.log",
        pid_file=folder / "server.pid",
        threads=1,
        timeout=timeout,
    )


@pytest.mark.slow
def test_a_server_process_is_started_once_serves_restarts_and_stops(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny.llama()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    base = resolve(str(folder), cache=tmp_path)
    shared = tiny.bundle({"alice": tiny.lora(model, seed=1, base_hash=base.hash)})
    bundle_id = shared.save(tmp_path / "bundle")
    expected = tiny.peft_text(model, PROMPT, shared.reconstruct("alice"), tokens=8)
    options = launch(tmp_path, str(folder))
    kept = token_file(options.state)  # the server is given no token, and makes one
    target = EmbeddedTarget(f"http://127.0.0.1:{free_port()}", base_hash=base.hash, token_file=kept)
    assert target.start(options)
    try:
        assert target.is_up() and not target.start(options)
        target.publish(tmp_path / "bundle", bundle_id=bundle_id)
        target.activate(bundle_id)
        assert target.complete(PROMPT, user="alice", max_new_tokens=8) == expected
        assert requests.get(f"{target.url}/soppu/v1/bundles", timeout=5).status_code == 401
        token = kept.read_text()
        assert kept.stat().st_mode & 0o777 == 0o600
        assert process.stop(options.pid_file) and not target.is_up()
        assert target.start(options)
        assert target.active() == bundle_id and kept.read_text() == token
        assert target.complete(PROMPT, user="alice", max_new_tokens=8) == expected
    finally:
        assert process.stop(options.pid_file)
    assert not options.pid_file.exists() and not target.is_up()
    assert not process.stop(options.pid_file)
    log = options.log.read_text()
    assert f"at {target.url}" in log and "Traceback" not in log


@pytest.mark.long
@pytest.mark.slow
def test_two_starts_at_once_start_one_server(tmp_path: Path) -> None:
    tiny.base(tmp_path / "model")
    target = EmbeddedTarget(f"http://127.0.0.1:{free_port()}")
    options = launch(tmp_path, str(tmp_path / "model"))
    try:
        with ThreadPoolExecutor(2) as pool:
            started = list(pool.map(target.start, [options] * 2))
        assert sorted(started) == [False, True]
        assert process.running(options.pid_file)
    finally:
        assert process.stop(options.pid_file)
    assert not target.is_up()


@pytest.mark.long
@pytest.mark.slow
def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    target = EmbeddedTarget(f"http://127.0.0.1:{free_port()}")
    options = launch(tmp_path, str(tmp_path / "absent"))
    with pytest.raises(
        TargetError, match=r"(?s)ended with exit code 1; last lines of .*holds no config.json"
    ) as caught:
        target.start(options)
    assert "Traceback" not in str(caught.value)
    assert not options.pid_file.exists()
    with pytest.raises(TargetError, match=r"was not ready after 0\.1 s"):
        target.start(replace(options, timeout=0.1))
    assert not options.pid_file.exists()


def test_a_pid_file_of_a_process_that_is_gone_ends_nobody(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pid_file = tmp_path / "server.pid"
        pid_file.write_text(json.dumps({"pid": bystander.pid, "mark": "not its start time"}))
        assert process.stop(pid_file) is False
        assert bystander.poll() is None and not pid_file.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(ServerInfo("m", "h", admin_token="secret"))
