"""Looks at servers and run folders beside the pages, and how what they give is worded and drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from soppu.dashboard import figures, watcher, wording
from soppu.dashboard.runs import Runs
from soppu.dashboard.watcher import Server, Watcher

VLLM = """# TYPE vllm:request_success counter
vllm:request_success_total{model_name="m"} 4
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{model_name="m"} 90
"""
ANSWERS = {
    "/good/metrics": (200, VLLM),
    "/bad/metrics": (200, "not { figures"),
    "/broken/metrics": (500, "no"),
    "/large/metrics": (200, "# nothing\n" * 1000),
    "/latin/metrics": (200, "# \udcff"),
}


class _Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow/metrics":
            time.sleep(0.3)
        status, body = ANSWERS.get(self.path, (404, ""))
        self.send_response(status)
        self.end_headers()
        with suppress(BrokenPipeError):  # who asked has read enough, or waits no longer
            self.wfile.write(body.encode(errors="surrogateescape"))

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "said"),
    [("bad", "{"), ("broken", "500"), ("slow", "0.1 s"), ("large", "larger than 0 MiB"), ("latin", "decode")],
)
def test_a_server_that_answers_something_else_is_away_and_keeps_what_it_said_last(
    url: str, path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(watcher, "_MOST_BYTES", 5000)
    server = Server("one", f"{url}/good")
    watcher.look(server)
    assert server.fault == "" and server.figures is not None and server.figures.total.tokens == 90
    server.url = f"{url}/{path}"
    watcher.look(server)
    assert said in server.fault and server.figures.total.requests == 4
    server.url = f"{url}/good"
    watcher.look(server)
    assert server.fault == "" and server.rates == [0.0]


def test_a_server_that_tells_no_users_apart_has_none_and_may_lack_figures() -> None:
    found = figures.read(VLLM)
    assert (found.total.requests, found.total.tokens, found.waiting) == (4, 90, None)
    assert found.total.quantile(0.5) is None and list(found.users) == [""]


def test_looks_go_on_beside_and_one_that_fails_is_tried_again(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs(tmp_path)
    refresh, failed, again = runs.refresh, threading.Event(), threading.Event()

    def once_broken() -> None:
        if watching.servers[0].figures is not None and not failed.is_set():
            failed.set()
            raise OSError("a disk that comes back")
        refresh()
        if failed.is_set():
            again.set()

    runs.refresh = once_broken  # type: ignore[method-assign]
    watching = Watcher(runs, {"one": f"{url}/good/", "two": "http://127.0.0.1:9"}, every_s=0.01)
    assert watching.servers[0].fault == "not asked yet"
    watching.start()
    assert again.wait(10)
    watching.stop()
    assert "looking at runs failed" in caplog.text
    assert [bool(one.fault) for one in watching.servers] == [False, True]
    assert watching.of_user("ann") == [] and watching.of_user("")[0][0].name == "one"


def test_a_sparkline_lies_in_its_frame_and_its_label_is_text() -> None:
    assert wording.sparkline([1.0], "one") == ""
    drawn = wording.sparkline([0.0, 5.0, 2.5], "<b>")
    assert 'points="0.0,26.0 60.0,2.0 120.0,14.0"' in drawn and "<b>" not in drawn
    assert "26.0" in wording.sparkline([0.0, 0.0], "nothing yet")


def test_what_cannot_be_seen_is_spelt_out_and_what_is_not_known_is_a_dash() -> None:
    assert wording.visible("a\x1b[31m\u202e\n") == "a\\x1b[31m\\x202e\n"
    say = wording.FILTERS
    assert [say[name](None) for name in ("ms", "count", "size", "took", "times", "share", "nats")] == [
        "–"
    ] * 7
    assert (say["ms"](1.2345), say["count"](1234.4), say["times"](16.04)) == ("1,234 ms", "1,234", "16.0×")
    assert (say["rate"]([]), say["rate"]([1.0, 2.25])) == ("–", "2.2 /s")
    assert say["when"]("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04"
