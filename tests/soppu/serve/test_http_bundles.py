"""The admin routes for bundles: what they answer, whom they let in, and what a restart finds on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError, StorageError, TargetError
from soppu.serve.api.http import ServerInfo
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from tests.soppu.serve import tiny
from tests.soppu.serve.http_server import Start, members, put, sha256, start, tar

__all__ = ["members", "start"]


@pytest.fixture(scope="module")
def shared(members: dict[str, LoraAdapter]) -> Bundle:
    return tiny.bundle(members)


def test_a_bundle_is_put_staged_activated_and_deleted(start: Start, shared: Bundle, tmp_path: Path) -> None:
    server = start()
    data = shared.to_bytes()
    bundle_id = sha256(data)
    url = f"/soppu/v1/bundles/{bundle_id}"
    assert server.client.put(url, content=data).status_code == 201
    assert server.client.put(url, content=data).status_code == 200
    assert server.post(adapter_id="alice").status_code == 424
    assert server.post(adapter_id=f"alice@{bundle_id[:8]}").status_code == 200
    assert server.client.post(f"{url}/activate").json() == {"active": bundle_id, "previous": ""}
    assert server.post(adapter_id="alice").status_code == 200
    listing = server.client.get("/soppu/v1/bundles").json()
    assert listing == {
        "active": bundle_id,
        "bundles": [{"bundle_id": bundle_id, "active": True, "users": ["alice", "bob", "žofie"]}],
    }
    refused = server.client.delete(url)
    assert (refused.status_code, refused.json()["error_type"]) == (409, "conflict")
    assert server.client.post("/soppu/v1/deactivate").json()["previous"] == bundle_id
    assert server.client.delete(url).status_code == 200
    assert server.client.delete(url).status_code == 404
    assert server.client.post(f"{url}/activate").status_code == 404
    assert list((tmp_path / "state" / "bundles").iterdir()) == []


def test_a_bundle_that_is_not_what_its_id_says_leaves_nothing(
    start: Start, shared: Bundle, tmp_path: Path
) -> None:
    server = start()
    data = shared.to_bytes()
    wrong = server.client.put(f"/soppu/v1/bundles/{'0' * 64}", content=data)
    assert wrong.status_code == 422 and sha256(data) in wrong.json()["error"]
    garbage = b"not a bundle"
    refused = server.client.put(f"/soppu/v1/bundles/{sha256(garbage)}", content=garbage)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "bundle")
    for name in ("abc", "A" * 64, "..%2f..%2fetc"):
        assert server.client.put(f"/soppu/v1/bundles/{name}", content=data).status_code in (404, 422)
    assert [path.name for path in (tmp_path / "state").rglob("*") if path.is_file()] == ["lock"]


def test_a_bundle_of_another_base_is_refused(start: Start, shared: Bundle) -> None:
    server = start(base_hash="c" * 64)
    data = shared.to_bytes()
    refused = server.client.put(f"/soppu/v1/bundles/{sha256(data)}", content=data)
    assert refused.status_code == 422 and "made for base model bbbbbbbbbbbb " in refused.json()["error"]


def test_a_restart_serves_what_was_active(
    start: Start, shared: Bundle, members: dict[str, LoraAdapter]
) -> None:
    server = start()
    first = put(server, shared)
    second = put(server, tiny.bundle({"bob": members["alice"]}), activate=False)
    server.client.put("/soppu/v1/adapters/dave", content=tar(members["bob"]))
    before = [server.post(adapter_id=who).json() for who in ("alice", "dave", f"bob@{second}")]
    server = start()
    assert server.bank.active == first
    assert [server.post(adapter_id=who).json() for who in ("alice", "dave", f"bob@{second}")] == before


def test_a_state_folder_is_one_servers_and_one_bases(start: Start, shared: Bundle, tmp_path: Path) -> None:
    server = start()
    put(server, shared)
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    with pytest.raises(TargetError, match="another server uses this state folder"):
        ServerState.open(tmp_path / "state", bank)
    server.state.close()
    other = AdapterBank(tiny.llama(), base_hash="c" * 64)
    with pytest.raises(
        TargetError, match="holds adapters of base model bbbbbbbbbbbb, this server has cccccccccccc"
    ):
        ServerState.open(tmp_path / "state", other)
    (path,) = (tmp_path / "state" / "bundles").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="SHA-256"):
        ServerState.open(tmp_path / "state", bank)
    whole = json.loads((tmp_path / "state" / "state.json").read_text())
    for damaged in ("[]", "{", json.dumps(whole | {"format": 2}), json.dumps(whole | {"bundles": 5})):
        (tmp_path / "state" / "state.json").write_text(damaged)
        with pytest.raises(TargetError, match="not a server state of format 1; move it away to start empty"):
            ServerState.open(tmp_path / "state", bank)


def test_the_admin_token_guards_every_admin_route_and_no_other(start: Start) -> None:
    server = start(token="secret")
    routes = [
        ("GET", "/soppu/v1/bundles"),
        ("PUT", f"/soppu/v1/bundles/{'0' * 64}"),
        ("POST", f"/soppu/v1/bundles/{'0' * 64}/activate"),
        ("DELETE", f"/soppu/v1/bundles/{'0' * 64}"),
        ("POST", "/soppu/v1/deactivate"),
        ("GET", "/soppu/v1/adapters"),
        ("PUT", "/soppu/v1/adapters/x"),
        ("DELETE", "/soppu/v1/adapters/x"),
    ]
    for method, path in routes:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = server.client.request(method, path, headers=headers)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
        allowed = server.client.request(method, path, headers={"authorization": "Bearer secret"})
        assert allowed.status_code != 401
    assert server.client.get("/info").status_code == 200
    assert "secret" not in repr(ServerInfo("m", "h", admin_token="secret"))


def test_a_full_disk_changes_nothing(
    start: Start, shared: Bundle, members: dict[str, LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    first = put(server, shared)
    staged = put(server, tiny.bundle({"carol": members["alice"]}), activate=False)
    server.client.put("/soppu/v1/adapters/dave", content=tar(members["alice"]))
    who = ("alice", "dave", f"carol@{staged}")
    before = [server.post(adapter_id=name).json() for name in who]
    second = tiny.bundle({"bob": members["alice"]}).to_bytes()

    write_text = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "state.json":
            raise StorageError(f"{path}: No space left on device")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("soppu.files.write_text", full)
        for method, path, content in (
            ("PUT", f"/soppu/v1/bundles/{sha256(second)}", second),
            ("PUT", "/soppu/v1/adapters/dave", tar(members["bob"])),
            ("PUT", "/soppu/v1/adapters/erin", tar(members["bob"])),
            ("POST", "/soppu/v1/deactivate", b""),
            ("DELETE", f"/soppu/v1/bundles/{staged}", b""),
            ("DELETE", "/soppu/v1/adapters/dave", b""),
        ):
            response = server.client.request(method, path, content=content)
            assert (response.status_code, response.json()["error_type"]) == (507, "storage")
        assert (server.bank.active, list(server.bank.bundles())) == (first, [first, staged])
        assert list(server.bank.adapters()) == ["dave"]
    assert [server.post(adapter_id=name).json() for name in who] == before
    server = start()
    assert [server.post(adapter_id=name).json() for name in who] == before
