"""The local stack refuses what is not its own. Bringing it up is tested in tests/flows."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from deploy.stack import Stack, down, healthy, main, up
from soppu.errors import PortTaken, TargetError
from soppu.federation.simulation import free_port
from tests.latecomer import latecomer


class Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"somebody else")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stranger() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_port_that_somebody_else_listens_on_is_named(stranger: int, tmp_path: Path) -> None:
    stack = Stack(api=f"http://127.0.0.1:{stranger}/api", state=tmp_path)
    with pytest.raises(PortTaken, match=rf"{stranger}.*somebody else"):
        up(stack)
    assert not list(tmp_path.rglob("*.pid"))


def test_a_server_that_comes_up_just_after_the_look_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with latecomer(requests.get, port) as look:
        monkeypatch.setattr(requests, "get", look)
        assert not healthy(Stack(api=f"http://127.0.0.1:{port}/api"))


def test_a_port_that_hangs_up_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(PortTaken, match="something listens, but is no Prefect server"):
            healthy(Stack(api=f"http://127.0.0.1:{listener.getsockname()[1]}/api"))


def test_a_remote_server_that_is_down_is_not_started_here(tmp_path: Path) -> None:
    stack = Stack(api="http://prefect.invalid:4200/api", state=tmp_path)
    assert not healthy(stack)
    with pytest.raises(TargetError, match=r"prefect\.invalid"):
        up(stack)


def test_down_with_nothing_up_ends_nothing(tmp_path: Path) -> None:
    assert set(down(Stack(state=tmp_path, serve_state=tmp_path / "serve")).values()) == {False}


@pytest.mark.parametrize("engine", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:9", "nonsense"])
def test_without_a_docker_engine_there_are_no_containers(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine)
    stack = Stack(state=tmp_path, serve_state=tmp_path / "serve")
    assert not [name for name in down(stack) if "container" in name]
    shown = CliRunner().invoke(main, ["status", "--api", "http://127.0.0.1:9/api"])
    assert shown.exit_code == 0 and "containers: -" in shown.output
