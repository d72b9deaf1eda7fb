"""Who may change what is served: who has the token, from everywhere, and no page of another site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from soppu.serve import admin_token
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

SOMETHING = {"bundle_id": "0" * 64, "name": "x", "user": "x", "number": "1"}


def paths() -> list[tuple[str, str]]:
    """Method and path of every admin route."""
    table: list[Route] = AdminApi(lambda: None).routes()  # type: ignore[arg-type, return-value]
    filled = [(route, route.path.replace(":path", "").format(**SOMETHING)) for route in table]
    return [(method, path) for route, path in filled for method in sorted(route.methods or ())]


def server(folder: Path, token: str) -> tuple[TestClient, ServerState]:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    state = ServerState.open(folder, bank)
    engine = Engine(model, tiny.tokenizer(), bank, EngineOptions())
    info = ServerInfo("tiny", tiny.BASE_HASH, admin_token=token)
    return TestClient(create_app(engine, info=info, state=state)), state


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    client, state = server(tmp_path_factory.mktemp("state"), tiny.TOKEN)
    with client:
        yield client
    state.close()


ALLOWED = {"authorization": f"Bearer {tiny.TOKEN}"}


@pytest.mark.parametrize(("method", "path"), paths())
def test_no_admin_route_answers_without_the_token(client: TestClient, method: str, path: str) -> None:
    wrong = ("", "Bearer ", "Bearer wrong", tiny.TOKEN, f"Basic {tiny.TOKEN}", f"Bearer {tiny.TOKEN}x")
    for given in wrong:
        refused = client.request(method, path, headers={"authorization": given})
        assert refused.status_code == 401, given
        assert method == "HEAD" or "SOPPU_ADMIN_TOKEN" in refused.json()["error"]
        assert refused.headers["www-authenticate"] == "Bearer"
    assert client.request(method, path, headers=ALLOWED).status_code != 401


def test_a_server_without_a_token_is_closed_not_open(tmp_path: Path) -> None:
    client, state = server(tmp_path / "state", "")
    with client:
        for method, path in paths():
            for headers in ({}, {"authorization": "Bearer "}, {"authorization": ""}):
                refused = client.request(method, path, headers=headers)
                assert refused.status_code == 401, path
                assert method == "HEAD" or "are closed" in refused.json()["error"]
        assert client.get("/info").status_code == 200
    state.close()


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://testserver:81", "https://testserver.evil.example", ""]
)
def test_a_page_of_another_site_sees_and_changes_nothing_even_with_the_token(
    client: TestClient, origin: str
) -> None:
    for method, path in paths():
        answer = client.request(method, path, headers=ALLOWED | {"origin": origin})
        assert answer.status_code == 403, (method, path)
    assert client.post("/generate", json={"inputs": "x"}, headers={"origin": origin}).status_code == 200


def test_the_servers_own_pages_may(client: TestClient) -> None:
    answer = client.post("/soppu/v1/deactivate", headers=ALLOWED | {"origin": "http://testserver"})
    assert answer.json() == {"active": "", "previous": ""}


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{}", 200),
        ("application/json; charset=utf-8", b'{"a": 1}', 200),
        ("application/json", b"", 200),
        ("application/x-www-form-urlencoded", b"", 200),  # what an empty POST of curl says
        ("application/x-www-form-urlencoded", b"a=1", 415),
        ("text/plain", b"{}", 415),
        ("multipart/form-data; boundary=x", b"--x--", 415),
        ("", b"{}", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 422),
    ],
)
def test_a_body_of_a_post_has_to_be_json(client: TestClient, kind: str, body: bytes, status: int) -> None:
    headers = ALLOWED | ({"content-type": kind} if kind else {})
    assert client.post("/soppu/v1/deactivate", content=body, headers=headers).status_code == status


def test_a_token_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = admin_token.token_file(tmp_path / "state")
    assert admin_token.read(path) == "" == admin_token.read(None)
    token = admin_token.ensure(path)
    assert len(token) >= 43 and admin_token.read(path) == token == admin_token.ensure(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["admin-token"]


def test_a_token_that_others_may_read_is_closed_to_them_and_an_empty_one_is_replaced(tmp_path: Path) -> None:
    path = admin_token.token_file(tmp_path)
    path.write_text("old\n")
    path.chmod(0o644)
    assert admin_token.ensure(path) == "old" and path.stat().st_mode & 0o777 == 0o600
    path.write_text("\n")
    assert admin_token.ensure(path) not in ("", "old")
    other = admin_token.ensure(admin_token.token_file(tmp_path / "other"))
    assert other != admin_token.read(path)
