"""Over real sockets: what no client library sends, streams as they come, and callers who hang up."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from soppu.errors import ConfigError
from soppu.gateway.server import GatewayServer
from soppu.serve.port import claim_port
from tests.soppu.gateway.house import House, house, settings_of

LIMITS = {"body_s": 0.2, "head_s": 0.2, "requests": "", "waiting_s": 5.0}


@contextlib.contextmanager
def listening(one: House) -> Iterator[tuple[str, int, GatewayServer]]:
    with claim_port("127.0.0.1", 0) as listener:
        server = GatewayServer(one.gateway)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield "127.0.0.1", listener.getsockname()[1], server
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("sockets"), limits=LIMITS, grace_s=2) as one:
        yield one


@pytest.fixture(scope="module")
def port(open_house: House) -> Iterator[int]:
    with listening(open_house) as (_, number, _):
        yield number


@pytest.fixture(autouse=True)
def _quiet(open_house: House) -> None:
    open_house.upstream.__init__()  # type: ignore[misc]


def said(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes back, until the other side closes or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(0.4)
        for part in parts:
            line.sendall(part)
            time.sleep(pause)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := line.recv(65536):
                found += chunk
        return found


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def request(one: House, body: bytes, *headers: str, path: str = "/generate", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", f"authorization: Bearer {one.keys['alice']}"]
    lines += ["content-type: application/json", *headers]
    if not any(header.startswith("connection:") for header in headers):
        lines.append("connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


OWN, BOBS = b'{"inputs":"hi"}', b'{"inputs":"hi","parameters":{"adapter_id":"bob"}}'
Make = Callable[[House], bytes]
RAW: dict[str, tuple[list[int], Make]] = {
    "pipelined": (
        [403, 403],
        lambda one: request(one, BOBS, "connection: keep-alive", f"content-length: {len(BOBS)}") * 2,
    ),
    "a length and chunks": (
        [400],
        lambda one: request(one, b"0\r\n\r\n" + BOBS, "content-length: 5", "transfer-encoding: chunked"),
    ),
    "chunks and a length that hides a second request": (
        [400],
        lambda one: request(
            one,
            b"0\r\n\r\n" + request(one, BOBS, f"content-length: {len(BOBS)}"),
            "content-length: 4",
            "transfer-encoding: chunked",
        ),
    ),
    "two lengths": (
        [400],
        lambda one: request(one, BOBS, "content-length: 2", f"content-length: {len(BOBS)}"),
    ),
    "a list of lengths": ([400], lambda one: request(one, BOBS, f"content-length: {len(BOBS)}, 2")),
    "a negative length": ([400], lambda one: request(one, BOBS, "content-length: -1")),
    "a hidden coding": (
        [400],
        lambda one: request(one, BOBS, "content-length: 2", "transfer-encoding: xchunked"),
    ),
    "two codings": (
        [400],
        lambda one: request(one, b"0\r\n\r\n", "transfer-encoding: chunked", "transfer-encoding: identity"),
    ),
    "a blank before the colon": ([400], lambda one: request(one, BOBS, f"content-length : {len(BOBS)}")),
    "a NUL in a header": (
        [400],
        lambda one: request(one, BOBS, "x-adapter-id: bo\x00b", f"content-length: {len(BOBS)}"),
    ),
    "a new line in a header": (
        [403],
        lambda one: request(one, OWN, "x-note: a\r\nx-adapter-id: bob", f"content-length: {len(OWN)}"),
    ),
    "a chunk of a bad length": (
        [400],
        lambda one: request(one, b"zz\r\n" + BOBS, "transfer-encoding: chunked"),
    ),
    "chunks of another": (
        [403],
        lambda one: request(one, b"%x\r\n%s\r\n0\r\n\r\n" % (len(BOBS), BOBS), "transfer-encoding: chunked"),
    ),
    "a whole address": (
        [404],
        lambda one: request(one, BOBS, f"content-length: {len(BOBS)}", path="http://serving:8080/generate"),
    ),
    "doubled slashes": (
        [404],
        lambda one: request(one, BOBS, f"content-length: {len(BOBS)}", path="//generate"),
    ),
    "upwards": (
        [404],
        lambda one: request(one, BOBS, f"content-length: {len(BOBS)}", path="/v1/../soppu/v1/bundles"),
    ),
    "a fragment": (
        [404],
        lambda one: request(one, BOBS, f"content-length: {len(BOBS)}", path="/generate#/x"),
    ),
    "a tunnel": ([404], lambda one: request(one, b"").replace(b"POST /generate", b"CONNECT serving:8080")),
    "an upgrade": (
        [403],
        lambda one: request(one, BOBS, "connection: upgrade", "upgrade: h2c", f"content-length: {len(BOBS)}"),
    ),
    "no HTTP": ([400], lambda one: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"),
    "HTTP/2 without asking": ([404, 400], lambda one: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "headers without an end": ([400], lambda one: b"GET / HTTP/1.1\r\n" + b"x-a: " + b"b" * 70_000),
}


@pytest.mark.parametrize("what", RAW)
def test_what_no_client_library_sends_is_refused_and_reaches_no_server(
    open_house: House, port: int, what: str
) -> None:
    due, make = RAW[what]
    assert statuses(said(port, make(open_house))) == due
    assert open_house.upstream.heard == []


def test_http_1_0_is_as_good_and_no_better(open_house: House, port: int) -> None:
    for body, status in ((BOBS, b"403"), (OWN, b"200")):
        answer = said(port, request(open_house, body, f"content-length: {len(body)}", version="1.0"))
        assert answer.split(b" ")[1] == status, answer
    assert len(open_house.upstream.heard) == 1


def test_an_upload_that_is_slow_is_ended_and_one_that_breaks_off_is_one_line(
    open_house: House, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "soppu.gateway.requests")
    answer = said(port, request(open_house, OWN[:5], f"content-length: {len(OWN)}"), pause=0.3)
    assert statuses(answer) == [408] and b"connection: close" in answer.lower()
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(request(open_house, OWN[:5], f"content-length: {len(OWN)}"))
        time.sleep(0.05)
    deadline = time.monotonic() + 2
    while "broke off" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    told = [json.loads(record.message)["status"] for record in caplog.records]
    assert [status for status in told if status != 200] == [408, 499]  # the test before may still be told of
    assert open_house.upstream.heard == []


@pytest.mark.long
def test_headers_that_never_end_are_not_waited_for(open_house: House, port: int) -> None:
    began = time.monotonic()
    assert said(port, b"POST /generate HTTP/1.1\r\n") == b""
    assert said(port) == b""
    assert time.monotonic() - began < 0.79  # each is closed after `head_s`, before the reader gives up
    body = request(open_house, OWN, f"content-length: {len(OWN)}")
    assert statuses(said(port, body[:20], body[20:], pause=0.1)) == [200]  # slow is not too slow


def test_a_stream_is_passed_on_piece_by_piece(open_house: House, port: int) -> None:
    open_house.upstream.pause, open_house.upstream.events = 0.03, 5
    moments = []
    with httpx.stream(
        "POST",
        f"http://127.0.0.1:{port}/generate_stream",
        json={"inputs": "hi"},
        headers=open_house.headers(),
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                moments.append(time.monotonic())
    assert len(moments) == 5 and moments[-1] - moments[0] > 0.09


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
def test_who_hangs_up_ends_the_request_at_the_server(open_house: House, port: int, path: str) -> None:
    upstream = open_house.upstream
    upstream.pause, upstream.events = (0.02 if "stream" in path else 3.0), 500
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(request(open_house, OWN, f"content-length: {len(OWN)}", path=path))
        deadline = time.monotonic() + 5
        while not upstream.heard and time.monotonic() < deadline:
            time.sleep(0.005)
    while not upstream.left and time.monotonic() < deadline:
        time.sleep(0.005)
    assert upstream.left == 1
    while open_house.gateway.servers.turns.in_flight and time.monotonic() < deadline:
        time.sleep(0.005)
    assert open_house.gateway.servers.turns.in_flight == 0


def test_a_server_that_breaks_off_ends_a_stream_with_an_event_that_says_so(tmp_path: Path) -> None:
    """The server behind is a socket that says half an answer and closes."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\nx-adapter-id: alice\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as behind, house(tmp_path) as one:
        url = f"http://127.0.0.1:{behind.getsockname()[1]}"
        one.registry.record_publication(target="embedded", url=url, bundle_id=one.registry.live(one.url))
        targets = [{"url": url}]

        def half() -> None:
            while True:
                try:
                    line, _ = behind.accept()
                except OSError:
                    return
                with line:
                    asked = line.recv(65536)
                    if asked.startswith(b"POST"):
                        kind = b"text/event-stream" if b"_stream " in asked else b"application/json"
                        line.sendall(head % kind + b"9\r\ndata: {}\n\r\n")

        threading.Thread(target=half, daemon=True).start()
        again = House(
            type(one.gateway).of(one.registry, settings_of(targets=targets)),
            one.registry,
            one.upstream,
            url,
            one.keys,
        )
        with listening(again) as (_, number, _):
            streamed = httpx.post(
                f"http://127.0.0.1:{number}/generate_stream", json={"inputs": "hi"}, headers=one.headers()
            )
            assert streamed.status_code == 200
            last = [line for line in streamed.text.splitlines() if line.startswith("data:")][-1]
            assert json.loads(last[5:])["error_type"] == "incomplete_generation"
            whole = httpx.post(
                f"http://127.0.0.1:{number}/generate", json={"inputs": "hi"}, headers=one.headers()
            )
            assert whole.status_code == 502


@pytest.mark.long
def test_more_than_it_takes_is_refused_at_once_and_the_rest_is_answered(tmp_path: Path) -> None:
    limits = {"in_flight": 2, "waiting": 2, "each_user": 3, "requests": ""}
    with house(tmp_path, limits=limits) as one, listening(one) as (_, number, _):
        one.upstream.pause = 0.2
        found: list[httpx.Response] = []

        def ask(who: str) -> None:
            found.append(
                httpx.post(
                    f"http://127.0.0.1:{number}/generate",
                    json={"inputs": "hi"},
                    headers=one.headers(who),
                    timeout=10,
                )
            )

        threads = [threading.Thread(target=ask, args=(who,)) for who in ["alice"] * 5 + ["bob"] * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = sorted(answer.status_code for answer in found)
        assert set(told) == {200, 429} and told.count(200) >= 4
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in found if answer.status_code == 429)
        assert one.gateway.servers.turns.in_flight == one.gateway.servers.turns.waiting == 0


@pytest.mark.long
def test_what_is_under_way_is_finished_when_it_is_told_to_stop(tmp_path: Path) -> None:
    with house(tmp_path, grace_s=5) as one:
        one.upstream.pause, one.upstream.events = 0.05, 10
        found: list[str] = []
        with listening(one) as (_, number, server):

            def ask() -> None:
                found.append(
                    httpx.post(
                        f"http://127.0.0.1:{number}/generate_stream",
                        json={"inputs": "hi"},
                        headers=one.headers(),
                        timeout=10,
                    ).text
                )

            asking = threading.Thread(target=ask)
            asking.start()
            while not one.upstream.heard:
                time.sleep(0.005)
            server.stop()
            asking.join(10)
        assert found[0].count("data:") == 10
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{number}/health")


def certificate(folder: Path) -> tuple[Path, Path]:
    made, key = folder / "cert.pem", folder / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", str(key), "-out", str(made), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return made, key


@pytest.mark.long
def test_it_speaks_tls_by_files_and_says_which_are_wrong(tmp_path: Path) -> None:
    made, key = certificate(tmp_path)
    tls = {"certificate": str(made), "key": str(key)}
    with house(tmp_path / "registry", tls=tls) as one, listening(one) as (_, number, _):
        trusting: Any = ssl.create_default_context(cafile=str(made))
        answer = httpx.post(
            f"https://127.0.0.1:{number}/generate",
            json={"inputs": "hi"},
            headers=one.headers(),
            verify=trusting,
        )
        assert answer.json() == {"generated_text": "by alice"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{number}/health")
    with (
        house(tmp_path / "other", tls={**tls, "key": str(made)}) as one,
        pytest.raises(ConfigError, match=r"tls\.key"),
    ):
        GatewayServer(one.gateway)
