"""What the gateway does for whoever may ask: policies, bounds, figures, logs, servers that come and go."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from soppu.errors import ConfigError
from soppu.gateway import settings as gateway_settings
from soppu.gateway.app import Gateway
from soppu.gateway.keys import KeyStore
from soppu.gateway.settings import GatewaySettings
from tests.soppu.gateway.house import House, house, registry_of, settings_of
from tests.soppu.registries import freeze, make_adapter

ASK = {"inputs": "a secret prompt"}


def ask(client: httpx.Client, one: House, who: str = "alice", **body: Any) -> httpx.Response:
    return client.post("/generate", json={**ASK, **body}, headers=one.headers(who))


def test_both_apis_reach_one_s_own_model_whole_and_in_a_stream(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        text = {"prompt": "a"}
        chat = {"messages": [{"role": "user", "content": "a"}]}
        asked = [("/", ASK), ("/generate", ASK), ("/v1/completions", text), ("/v1/chat/completions", chat)]
        for path, body in asked:
            whole = client.post(path, json=body, headers=one.headers())
            assert whole.status_code == 200 and "by alice" in whole.text
            assert whole.headers["x-adapter-id"] == "alice" and whole.headers["x-total-tokens"] == "7"
            assert "secret" not in str(whole.headers)
            streamed = client.post(path, json={**body, "stream": True}, headers=one.headers())
            is_stream = streamed.headers["content-type"].startswith("text/event-stream")
            assert is_stream == (path != "/generate")
        streamed = client.post("/generate_stream", json=ASK, headers=one.headers())
        assert streamed.text.count("data:") == 3
        for path, _, headers in one.upstream.heard:
            assert "authorization" not in headers and path in {path for path, _ in asked} | {
                "/generate_stream"
            }


def test_users_without_an_adapter_get_the_base_model_or_404(tmp_path: Path) -> None:
    with house(tmp_path / "a") as one, one.client() as client:
        assert ask(client, one, "newcomer").json() == {"generated_text": "by "}
        assert ask(client, one, "newcomer", model="newcomer").status_code == 200
        assert ask(client, one, "newcomer", model="alice").status_code == 403
        one.upstream.answers_as = "alice"  # a server that would take the base model's request for hers
        assert ask(client, one, "newcomer").status_code == 502
    with house(tmp_path / "b", without_adapter="refuse") as one, one.client() as client:
        assert ask(client, one, "newcomer").status_code == 404 and not one.upstream.heard
        assert ask(client, one).status_code == 200
        one.registry.forget("alice")
        assert ask(client, one).status_code == 404  # from the next request on
        assert ask(client, one, "bob").status_code == 200


def test_a_revoked_key_is_refused_from_the_next_request_on(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        assert ask(client, one).status_code == 200
        KeyStore(one.registry.catalogue).revoke(user="alice")
        refused = ask(client, one)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert ask(client, one, "bob").status_code == 200


def test_a_publication_is_followed_from_the_next_request_on(tmp_path: Path) -> None:
    with house(tmp_path, target="lorax") as one, one.client() as client:
        registry = one.registry
        for version in ("1", "2"):
            adapter = registry.put_adapter(make_adapter(int(version) + 10), user="alice")
            bundle_id = registry.put_bundle(version.encode() * 2, set_id=freeze(registry, {"alice": adapter}))
            placed = {"alice": f"adapters/alice/{version}"}
            registry.record_publication(target="lorax", url=one.url, bundle_id=bundle_id, placements=placed)
            assert ask(client, one, adapter_id="alice").json() == {
                "generated_text": f"by adapters/alice/{version}"
            }
            assert one.upstream.heard[-1][1]["parameters"]["adapter_source"] == "local"


def test_an_answer_of_another_adapter_is_not_passed_on(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        one.upstream.answers_as = "bob"
        for path in ("/generate", "/generate_stream"):
            answer = client.post(path, json=ASK, headers=one.headers())
            assert answer.status_code == 502 and "bob" not in answer.text


def test_a_server_s_refusal_is_passed_on_and_its_secrets_are_not(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        for said, told in (
            (422, 422),
            (429, 429),
            (424, 424),
            (401, 502),
            (403, 502),
            (307, 502),
            (503, 503),
        ):
            one.upstream.status = said
            answer = ask(client, one)
            assert answer.status_code == told, said


def test_servers_of_one_version_share_requests_and_one_that_is_gone_is_passed_by(tmp_path: Path) -> None:
    with house(tmp_path) as one:
        gone = "http://127.0.0.1:9"
        for url in (gone, one.url):
            bundle_id = one.registry.live(one.url)
            one.registry.record_publication(target="embedded", url=url, bundle_id=bundle_id)
        place = one.gateway.servers.directory.place("alice")
        assert set(place.replicas) == {gone, one.url}
        with one.client() as client:
            for _ in range(4):
                assert ask(client, one).status_code == 200
            told = client.get("/soppu/v1/servers", headers=one.headers("admin")).json()["servers"]
            assert {row["url"]: row["healthy"] for row in told} == {gone: False, one.url: True}
            assert client.get("/health").status_code == 200
            evil = {**one.headers("admin"), "origin": "http://evil.example"}
            assert client.get("/soppu/v1/servers", headers=evil).status_code == 403


def test_where_nobody_listens_the_caller_is_told_when_to_come_again(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "http://127.0.0.1:9")
    text, _ = KeyStore(registry.catalogue).create("alice")
    from starlette.testclient import TestClient

    with TestClient(Gateway.of(registry, settings_of()).app(), raise_server_exceptions=False) as client:
        for method, path in (("POST", "/generate"), ("GET", "/info")):
            answer = client.request(
                method,
                path,
                json=ASK if method == "POST" else None,
                headers={"authorization": f"Bearer {text}"},
            )
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        while client.get("/health").status_code != 503:
            time.sleep(0.01)
    registry.close()


def test_a_server_that_is_not_healthy_comes_last(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        one.upstream.healthy = False
        while client.get("/health").status_code != 503:
            time.sleep(0.01)
        assert ask(client, one).status_code == 200  # it is all there is
        one.upstream.healthy = True
        while client.get("/health").status_code != 200:
            time.sleep(0.01)


def test_rates_and_budgets_are_each_users_own(tmp_path: Path) -> None:
    limits = {"requests": "3/hour", "tokens": "40/day", "new_tokens": 5}
    with house(tmp_path, limits=limits) as one, one.client() as client:
        answers = [ask(client, one) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 3000 < int(answers[3].headers["retry-after"]) <= 3600 and "3 per 1 hour" in answers[3].text
        assert one.upstream.heard[0][1]["parameters"]["max_new_tokens"] == 5
        assert ask(client, one, "bob", parameters={"max_new_tokens": 5, "best_of": 8}).status_code == 429
        assert ask(client, one, "bob").status_code == 200
        long = client.post("/generate", json={"inputs": "x" * 36}, headers=one.headers("bob"))
        assert long.status_code == 429 and "tokens a day" in long.text
        assert len(one.upstream.heard) == 4


def test_an_admin_reaches_figures_and_no_model(tmp_path: Path) -> None:
    with house(tmp_path, metric_users="hashed") as one, one.client() as client:
        ask(client, one)
        assert ask(client, one, "admin").status_code == 403
        assert client.get("/v1/models", headers=one.headers("admin")).status_code == 403
        assert client.get("/metrics").status_code == 401
        figures = client.get("/metrics", headers=one.headers("admin")).text
        assert 'soppu_gateway_requests_total{route="/generate",status="200"} 1.0' in figures
        assert "soppu_gateway_user_tokens_total{user=" in figures and "alice" not in figures
        assert "soppu_gateway_servers_healthy 1.0" in figures
    with house(tmp_path / "open", metric_users="names", open_metrics=True) as one, one.client() as client:
        ask(client, one)
        assert 'soppu_gateway_user_tokens_total{user="alice"} 7.0' in client.get("/metrics").text


@pytest.mark.parametrize("how", ["names", "hashed", "none"])
def test_the_log_has_a_line_for_each_request_and_no_prompt(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "soppu.gateway.requests")
    with house(tmp_path, log_users=how) as one, one.client() as client:
        ask(client, one)
        ask(client, one, model="a secret name")
        client.post("/generate_stream", json=ASK, headers=one.headers())
        client.get("/a-secret-path")
        lines = [
            json.loads(record.message) for record in caplog.records if record.name == "soppu.gateway.requests"
        ]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/generate", 200),
        ("/generate", 403),
        ("/generate_stream", 200),
        ("(other)", 404),
    ]
    assert "secret" not in json.dumps(lines) and one.keys["alice"] not in json.dumps(lines)
    assert lines[0]["tokens"] == 7 and lines[2]["tokens"] == 3 + len(ASK["inputs"]) // 4
    assert lines[1]["why"] == "forbidden"
    assert {"names": "alice", "none": None}.get(how, lines[0].get("user")) == lines[0].get("user")
    assert (lines[0].get("user") == "alice") == (how == "names")


def test_the_model_that_there_is_and_what_is_told_of_its_server(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        listed = client.get("/v1/models", headers=one.headers()).json()["data"]
        assert [model["id"] for model in listed] == ["alice"]
        assert client.get("/v1/models/alice", headers=one.headers()).json() == listed[0]
        told = client.get("/info", headers=one.headers()).json()
        assert told["model_id"] == "tiny" and told["max_best_of"] == 4 and "secret" not in str(told)
        assert client.get("/info").status_code == 401 and client.get("/").status_code == 200
        document = client.get("/api-doc/openapi.json").json()
        assert {"/generate", "/v1/chat/completions"} <= document["paths"].keys()


def test_a_gateway_that_stops_takes_nothing_new(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        one.gateway.draining = True
        assert ask(client, one).status_code == 503 and client.get("/health").status_code == 503


def test_a_target_without_an_address_is_passed_by_and_one_may_lie_below_a_path(tmp_path: Path) -> None:
    with house(tmp_path) as one, one.client() as client:
        bundle_id = one.registry.live(one.url)
        one.registry.record_publication(target="lorax", url="", bundle_id=bundle_id)
        assert ask(client, one).status_code == ask(client, one, "newcomer").status_code == 200
        one.registry.record_publication(target="embedded", url=f"{one.url}/below/", bundle_id=bundle_id)
        assert f"{one.url}/below" in one.gateway.servers.directory.place("alice").replicas


def test_a_catalogue_that_cannot_be_read_is_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with house(tmp_path) as one, one.client() as client:
        (tmp_path / "catalogue.db").rename(tmp_path / "away.db")
        one.registry.close()
        answer = ask(client, one)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


def test_a_fault_of_ours_is_a_500_and_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with house(tmp_path) as one, one.client() as client:
        one.gateway.servers.directory.place = None  # type: ignore[assignment,method-assign]
        answer = ask(client, one)
        assert answer.status_code == 500 and answer.json()["error_type"] == "internal"
    assert "secret" not in caplog.text and "relay.py" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 99999", "port"),
        ('without_adapter = "anybody"', "without_adapter"),
        ("[limits]\nrequests = 'often'", "limits.requests"),
        ("[limits]\ntokens = '-1/day'", "limits.tokens"),
        ("[limits]\nbody_s = 0", "limits.body_s"),
        ("[limits]\nrequest = ''", "did you mean requests"),
        ("[[targets]]\nurl = 'ftp://x'", "targets"),
        ("[[targets]]\nurl = 'http://x?y'", "targets"),
        ("[[targets]]\nurl = 'http://x'\n[[targets]]\nurl = 'http://x/'", "named twice"),
        ("[tls]\ncertificate = 'x'", "go together"),
        ("[jwt]\nissuer = 'x'", "jwt.audience"),
        ("= 1", "not TOML"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "gateway.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        gateway_settings.load(tmp_path / "gateway.toml")


def test_settings_of_a_file_give_way_to_single_ones(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text('port = 1\n[limits]\nrequests = "5/second"\n')
    read = gateway_settings.load(tmp_path / "gateway.toml", {"port": 2, "limits.waiting": 7})
    assert (read.port, read.limits.requests, read.limits.waiting) == (2, "5/second", 7)
    assert gateway_settings.load(None) == GatewaySettings()
    with pytest.raises(ConfigError, match="port is no table"):
        gateway_settings.load(tmp_path / "gateway.toml", {"port.x": 1})
    with pytest.raises(ConfigError, match="cannot be read"):
        gateway_settings.load(tmp_path / "absent.toml")
