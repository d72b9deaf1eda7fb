"""The live page over a real registry, real run folders and a server that comes and goes."""

from __future__ import annotations

import html
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from soppu import user_ids
from soppu.base_identity import Base
from soppu.cores.basis import CoreBasis
from soppu.cores.core import zero
from soppu.dashboard import figures, runs, watcher
from soppu.dashboard.app import application
from soppu.dashboard.runs import Runs
from soppu.dashboard.views import House
from soppu.dashboard.watcher import Server, Watcher
from soppu.progress import events
from soppu.progress.events import Event
from soppu.registry import Registry
from tests.soppu.dashboard import crowd
from tests.soppu.evaluate.example import make_report

HOSTILE = user_ids.to_id("<script>alert(1)")
METRICS = """# TYPE soppu_adapter_requests counter
soppu_adapter_requests_total{adapter="ann@0f",outcome="success"} 3
soppu_adapter_requests_total{adapter="ann",outcome="failure"} 1
soppu_adapter_requests_total{adapter="",outcome="success"} 5
# TYPE soppu_adapter_request_duration_seconds histogram
soppu_adapter_request_duration_seconds_bucket{adapter="ann",le="0.1"} 2
soppu_adapter_request_duration_seconds_bucket{adapter="ann",le="0.2"} 4
soppu_adapter_request_duration_seconds_bucket{adapter="ann",le="+Inf"} 4
# TYPE lorax_queue_length gauge
lorax_queue_length 7
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    root = tmp_path_factory.mktemp("registry")
    made = Registry.open(str(root))
    made.put_adapter(crowd.adapter(0), user="user-000", run="r")
    others = tuple(f"user-{number:03}" for number in range(1, 60))
    crowd.hold(root / "catalogue.db", others, made.current_set())
    made.put_adapter(crowd.adapter(200), user="ann", run="first")
    made.put_adapter(crowd.adapter(201), user="ann", run="second")
    made.put_adapter(crowd.adapter(203), user="gone", run="r")
    made.put_adapter(crowd.adapter(202), user=HOSTILE, run="r")
    yield made
    made.close()


@pytest.fixture
def house(registry: Registry, tmp_path: Path) -> House:
    there = Runs(tmp_path / "runs")
    return House(registry, there, Watcher(there, {"embedded": "http://127.0.0.1:9"}), name="here")


@pytest.fixture
def client(house: House) -> TestClient:
    return TestClient(application(house), base_url="http://localhost")


def test_users_are_paged_and_searched_by_the_server(client: TestClient) -> None:
    first = client.get("/users").text
    assert "user-000" in first and "user-059" not in first and "Next" in first
    second = client.get("/users", params={"after": "user-049"}).text
    assert "user-050" in second and "user-049</a>" not in second and 'class="previous"' in second
    assert "user-059" in client.get("/users", params={"q": "059"}).text
    assert "Nobody has" in client.get("/users", params={"q": "%_"}).text  # no wildcards of the database's
    assert "ann" in client.get("/users", params={"q": "an"}).text


def test_every_page_leads_back_to_the_one_before_it(client: TestClient) -> None:
    def led(page: str, word: str) -> str:
        return html.unescape(re.search(rf'class="{word}" href="([^"]+)"', page)[1])  # type: ignore[index]

    def shown(page: str) -> list[str]:
        return re.findall(r'<td class="who"><a href="([^"]+)"', page)

    for query in ("/users", "/users?q=user"):
        first = client.get(query).text
        second = client.get(led(first, "next")).text
        back = client.get(led(second, "previous")).text
        assert len(shown(first)) == 50 and shown(back) == shown(first) and shown(second)
        assert 'class="previous"' not in first + back and 'class="next"' not in second
    for beyond in ({"after": "zzz"}, {"before": "!"}):
        nobody = client.get("/users", params=beyond).text
        assert "There are no more" in nobody and "First page" in nobody


def test_a_user_has_every_version_and_leads_to_it(client: TestClient, registry: Registry) -> None:
    page = client.get("/users/ann").text
    versions = [row.adapter_id for row in registry.history("ann")]
    assert len(versions) == 2 and all(f"/adapters/{one}" in page for one in versions)
    assert page.index(versions[1]) < page.index(versions[0])  # the newest first
    assert "ann" in client.get(f"/adapters/{versions[0]}").text


def test_names_are_text_and_never_markup(client: TestClient) -> None:
    for path in ("/users", f"/users/{HOSTILE.replace('%', '%25')}"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "<script>alert" not in answer.text and "&lt;script&gt;alert" in answer.text


def test_a_folder_s_name_turns_no_text_around(client: TestClient, house: House, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo-\u202e<1>"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    house.runs.refresh()
    for path in ("/", "/runs", "/runs/demo-%E2%80%AE%3C1%3E"):
        page = client.get(path).text
        assert "demo-\\x202e&lt;1&gt;" in page and "\u202e" not in page


@pytest.mark.parametrize(
    "path",
    ["/users/nobody", "/users/..%2F..%2Fetc", "/users/%00", "/adapters/a-0", "/bundles/00", "/runs/absent",
     "/runs/..%2Fregistry", "/runs/r/config.toml", "/static/../app.py", "/none"],
)  # fmt: skip
def test_what_is_not_there_is_said_in_words(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "Traceback" not in answer.text


def test_it_changes_nothing_and_is_read_from_here_alone(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/users/ann").status_code == 405
    hosts = {"evil.example": 400, "evil.example:80": 400, "localhost:80": 200, "[::1]:80": 200, "[::1]": 200}
    for host, status in hosts.items():
        assert client.get("/", headers={"host": host}).status_code == status, host
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert client.get("/static/htmx.min.js").status_code == 200


def test_runs_are_paged_newest_first_and_lead_to_their_own_pages(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    for number in range(60):
        folder = tmp_path / "runs" / f"run-{number:02}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        os.utime(folder / "config.toml", (1e9 + number, 1e9 + number))
    (folder / "report.html").write_text("<script>its own</script>")
    house.runs.refresh()
    first = client.get("/runs").text
    assert "run-59" in first and "run-10" in first and "run-09" not in first and "after=50" in first
    assert "the newest 10 of" in client.get("/").text
    second = client.get("/runs", params={"after": "50"}).text
    assert "run-09" in second and "run-10" not in second and "Next" not in second
    assert (
        'href="/runs?after=0">Previous' in second
        and 'href="/runs?after=10">' in client.get("/runs?after=999").text
    )
    assert "There are no more" in client.get("/runs", params={"after": "999"}).text
    assert client.get("/runs", params={"after": "-1"}).text == client.get("/runs", params={"after": "²"}).text
    assert "/runs/run-59/report.html" in client.get("/runs/run-59").text
    page = client.get("/runs/run-59/report.html")
    assert "its own" in page.text and "sandbox" in page.headers["content-security-policy"]
    assert client.get("/runs/run-58/report.html").status_code == 404


def test_a_registry_that_cannot_be_read_is_said_on_the_page(tmp_path: Path) -> None:
    registry, there = Registry.open(tmp_path), Runs(tmp_path / "runs")
    registry.close()
    client = TestClient(application(House(registry, there, Watcher(there, {}), name="here")))
    client.base_url = "http://localhost"
    assert "Nobody has an adapter yet" in client.get("/users").text
    registry.close()
    (tmp_path / "catalogue.db").write_bytes(b"no database" * 1000)
    answer = client.get("/users")
    assert answer.status_code == 503 and "the registry cannot be read" in answer.text
    assert client.get("/health").text == "ok"


def test_an_adapter_has_its_users_and_what_was_measured_of_it(
    client: TestClient, house: House, registry: Registry, tmp_path: Path
) -> None:
    adapter, told = registry.current("ann"), make_report(users=["ann"])
    told["users"][0]["adapter_id"] = adapter
    (tmp_path / "runs" / "demo-9").mkdir(parents=True)
    (tmp_path / "runs" / "demo-9" / "report.json").write_text(json.dumps(told))
    house.runs.refresh()
    page = client.get(f"/adapters/{adapter}").text
    assert "demo-9" in page and f"{told['users'][0]['loss_base']:.3f}" in page and "current" in page
    assert "demo-9" in client.get("/users/ann").text


def test_a_user_is_not_said_to_be_unmeasured_while_a_report_is_being_read(
    client: TestClient, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_LARGE", 10)
    (tmp_path / "runs" / "demo-8").mkdir(parents=True)
    (tmp_path / "runs" / "demo-8" / "report.json").write_text(json.dumps(make_report(users=["ann"])))
    assert "No run that is here" in client.get("/users/ann").text
    house.runs.refresh()
    page = client.get("/users/ann").text
    assert "No run that is here" not in page and "Being read" in page and "demo-8" in page


def test_a_core_is_told_with_its_basis(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    draw = torch.Generator().manual_seed(0)
    sides = torch.randn(8, 2, generator=draw), torch.randn(8, 3, generator=draw)
    basis = CoreBasis({"model.layers.0.self_attn.q_proj": sides}, "tiny", "b" * 64)
    registry.put_basis(basis)
    registry.use_basis(basis.id)
    core = registry.put_adapter(zero(basis), user="ann")
    there = Runs(tmp_path / "runs")
    client = TestClient(
        application(House(registry, there, Watcher(there, {}), name="here")), base_url="http://localhost"
    )
    page = client.get(f"/adapters/{core}").text
    assert f'A core, told in basis <span class="mono">{basis.id}</span>, which is in force. 1 core is' in page
    assert core in client.get("/users/ann").text
    registry.close()


def test_an_adapter_that_many_hold_says_of_each_what_their_own_history_says(registry: Registry) -> None:
    shared, own = registry.current("user-000"), registry.current("ann")
    members = registry.freeze_current(Base("tiny", crowd.HASH))
    bundle = registry.put_bundle(b"shared", set_id=members)
    registry.record_publication(target="one", url="http://127.0.0.1:7", bundle_id=bundle)
    registry.put_adapter(crowd.adapter(300), user="user-003", run="later")
    rows = registry.held(shared, limit=99)
    assert [who for who, _ in rows] == [f"user-{number:03}" for number in range(60)]
    told = {who: [row for row in registry.history(who) if row.adapter_id == shared] for who, _ in rows}
    assert all(told[who] == [row] for who, row in rows)
    assert [row.current for _, row in rows].count(False) == 1
    assert registry.held(shared, limit=5) == rows[:5] and registry.held("a-0") == ()
    assert registry.held(own)[0][1].published == ("one http://127.0.0.1:7",)


def test_a_run_in_flight_one_that_is_unreadable_and_a_forgotten_user(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    flying, broken = tmp_path / "runs" / "demo-1", tmp_path / "runs" / "demo-2"
    for folder in (flying, broken):
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
    (broken / "report.json").write_text(json.dumps({"format": 1}))
    began = Event(1.0, "run", "began", stages=("federate", "compress"), **events.this_process())
    for event in (began, Event(2.0, "federate", "began", pid=began.pid)):
        events.append(flying, event)
    events.append(flying, Event(3.0, "federate", note="user <b>ann</b>", share=0.25, pid=began.pid))
    house.runs.refresh()
    page = client.get("/").text
    assert "user &lt;b&gt;ann&lt;/b&gt;" in page and "25.0 %" in page and "unreadable" in page
    assert "25.0 %" in client.get("/runs/demo-1").text
    events.append(flying, Event(4.0, "run", "done", seconds=3.0, pid=began.pid))
    house.runs.refresh()
    assert "25.0 %" not in client.get("/").text
    house.registry.forget("gone")
    assert "forgotten" in client.get("/users/gone").text


def test_a_run_that_began_long_ago_is_in_flight_as_long_as_its_process_is_there(tmp_path: Path) -> None:
    here = events.this_process()
    processes = {"there": here, "gone": {**here, "since": 1.0}}  # the same number, of an earlier process
    for name, process in processes.items():
        (tmp_path / name).mkdir()
        events.append(tmp_path / name, Event(1.0, "run", "began", stages=("federate",), **process))
        for number in range(2000):
            told = Event(2.0 + number, "federate", note=f"step {number}", share=0.1, pid=here["pid"])
            events.append(tmp_path / name, told)
    seen = Runs(tmp_path)
    for _ in range(2):
        seen.refresh()
        assert list(seen.flights()) == ["there"]


class _Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_traffic_of_a_server_that_is_there_and_then_is_not(client: TestClient, house: House) -> None:
    assert "away" in client.get("/").text
    with HTTPServer(("127.0.0.1", 0), _Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = house.watcher.servers[0]
        one.url = f"http://127.0.0.1:{server.server_port}"
        watcher.look(one)
        server.shutdown()
    assert not one.fault and "away" not in client.get("/").text
    page = client.get("/users/ann").text
    assert "Traffic" in page and "100 ms" in page
    watcher.look(one)
    assert "does not answer" in client.get("/").text


def test_figures_of_versions_are_of_one_user_and_quantiles_lie_in_their_buckets() -> None:
    found = figures.read(METRICS)
    ann = found.users["ann"]
    assert (ann.requests, ann.failures, found.total.requests, found.waiting) == (3, 1, 8, 7)
    assert ann.quantile(0.5) == pytest.approx(0.1) and ann.quantile(1.0) == pytest.approx(0.2)
    assert figures.quantile([], 0.5) is None
    assert figures.quantile([(0.5, 0.0), (float("inf"), 4.0)], 0.9) == 0.5


def test_a_server_that_began_anew_has_no_negative_rate() -> None:
    server = Server("a", "http://x")
    server.history.extend([(0.0, 10.0), (2.0, 14.0), (4.0, 1.0)])
    assert server.rates == [2.0, 0.0]
