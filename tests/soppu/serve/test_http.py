"""The HTTP API: LoRAX's bodies, headers and errors, and the admin routes with what they leave on disk."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from starlette.testclient import TestClient
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import AdapterError, BundleError, StorageError, TargetError
from soppu.serve.api.admin import unpack_adapter
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

PROMPT = "the quick"


@dataclass
class Server:
    client: TestClient
    model: PreTrainedModel
    engine: Engine
    bank: AdapterBank
    state: ServerState

    def post(self, path: str = "/generate", *, stream: bool | None = None, **parameters: Any) -> Any:
        body: dict[str, Any] = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6, **parameters}}
        return self.client.post(path, json=body if stream is None else {**body, "stream": stream})


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers on one state folder; stops the one before, as a restart would."""
    torch.set_num_threads(1)
    running: list[Server] = []

    def stop() -> None:
        while running:
            server = running.pop()
            server.client.__exit__(None, None, None)
            server.state.close()

    def build(*, token: str = tiny.TOKEN, base_hash: str = tiny.BASE_HASH, **options: int) -> Server:
        stop()
        model = tiny.llama()
        bank = AdapterBank(model, base_hash=base_hash)
        state = ServerState.open(tmp_path / "state", bank)
        engine = Engine(model, tiny.tokenizer(), bank, EngineOptions(**options))
        app = create_app(engine, info=ServerInfo("tiny", base_hash, admin_token=token), state=state)
        headers = {"authorization": f"Bearer {tiny.TOKEN}"}
        server = Server(TestClient(app, headers=headers).__enter__(), model, engine, bank, state)
        running.append(server)
        return server

    yield build
    stop()


@pytest.fixture(scope="module")
def members() -> dict[str, LoraAdapter]:
    return {
        name: tiny.lora(tiny.llama(), seed=seed) for seed, name in enumerate(("alice", "bob", "žofie"), 1)
    }


@pytest.fixture(scope="module")
def shared(members: dict[str, LoraAdapter]) -> Bundle:
    return tiny.bundle(members)


def put(server: Server, bundle: Bundle, *, activate: bool = True) -> str:
    data = bundle.to_bytes()
    bundle_id = sha256(data)
    assert server.client.put(f"/soppu/v1/bundles/{bundle_id}", content=data).status_code in (200, 201)
    if activate:
        assert server.client.post(f"/soppu/v1/bundles/{bundle_id}/activate").status_code == 200
    return bundle_id


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a stream, after checking its bytes line by line."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n")
    assert lines[-1] == "" and lines[1::2] == [""] * (len(lines) // 2)
    assert all(line.startswith("data: {") for line in lines[:-1:2])
    return [json.loads(line[6:]) for line in lines[:-1:2]]


def test_generate_answers_one_object_with_headers(start: Start, shared: Bundle) -> None:
    server = start()
    bundle_id = put(server, shared)
    response = server.post(adapter_id="alice", details=True)
    body = response.json()
    assert response.status_code == 200
    assert body["generated_text"] == tiny.peft_text(
        tiny.llama(), PROMPT, shared.reconstruct("alice"), tokens=6
    )
    details = body["details"]
    assert {
        key: details[key]
        for key in ("finish_reason", "generated_tokens", "skipped_tokens", "seed", "prefill")
    } == {
        "finish_reason": "length",
        "generated_tokens": 6,
        "skipped_tokens": 0,
        "seed": None,
        "prefill": [],
    }
    assert "".join(token["text"] for token in details["tokens"]) == body["generated_text"]
    assert all(set(token) == {"id", "text", "logprob", "special", "skipped"} for token in details["tokens"])
    assert all(isinstance(token["logprob"], float) for token in details["tokens"])
    headers = response.headers
    assert (headers["x-adapter-id"], headers["x-adapter-version"]) == ("alice", bundle_id)
    assert headers["x-model-id"] == "tiny"
    assert int(headers["x-total-tokens"]) == details["prompt_tokens"] + 6
    assert int(headers["x-total-time"]) >= int(headers["x-inference-time"]) >= 0


def test_details_only_where_asked_and_no_adapter_headers_for_the_base(start: Start) -> None:
    server = start()
    response = server.post()
    assert set(response.json()) == {"generated_text"}
    assert "x-adapter-id" not in response.headers
    assert response.json()["generated_text"] == tiny.peft_text(tiny.llama(), PROMPT, None, tokens=6)
    assert server.post(return_full_text=True).json()["generated_text"].startswith(PROMPT)


def test_the_compat_route_answers_a_list_of_one_or_a_stream(start: Start) -> None:
    server = start()
    plain = server.post("/").json()
    assert isinstance(plain, list) and len(plain) == 1
    assert server.post("/invocations").json() == plain
    streamed = events(server.post("/", stream=True))
    assert streamed[-1]["generated_text"] == plain[0]["generated_text"]


def test_a_stream_is_one_event_a_token_and_ends_without_done(start: Start, shared: Bundle) -> None:
    server = start()
    put(server, shared)
    whole = server.post(adapter_id="žofie", details=True).json()
    response = server.post("/generate_stream", adapter_id="žofie", details=True)
    found = events(response)
    assert "[DONE]" not in response.text
    assert all(set(event) == {"token", "generated_text", "details"} for event in found)
    assert [event["token"] for event in found] == whole["details"]["tokens"]
    assert [event["generated_text"] for event in found[:-1]] == [None] * 5
    assert found[-1]["generated_text"] == whole["generated_text"]
    assert set(found[-1]["details"]) == {"finish_reason", "prompt_tokens", "generated_tokens", "seed"}
    assert response.headers["x-adapter-id"] == "%C5%BEofie"
    assert response.headers["x-accel-buffering"] == "no"
    assert events(server.post("/generate_stream"))[-1]["details"] is None


def test_errors_have_loraxs_status_and_form(start: Start) -> None:
    server = start()
    for path in ("/", "/generate", "/generate_stream"):
        response = server.post(path, adapter_id="nobody")
        assert response.status_code == 424
        assert response.json()["error_type"] == "generation"
        assert response.json()["error"].startswith(
            "Request failed during generation: Server error: adapter 'nobody' is not served here"
        )
        response = server.post(path, top_p=2)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")
        assert (
            response.json()["error"] == "Input validation error: `top_p` must be > 0.0 and <= 1.0. Given: 2.0"
        )
    assert (
        server.client.post(
            "/generate", content=b"{", headers={"content-type": "application/json"}
        ).status_code
        == 400
    )
    assert server.client.post("/generate", content=b"{}").status_code == 415
    big = json.dumps({"inputs": "a" * (3 << 20)})
    response = server.client.post(
        "/generate", content=big, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.status_code == 413
    assert server.client.get("/nowhere").json()["error_type"] == "not_found"
    assert server.client.get("/generate").status_code == 405


def test_an_error_inside_a_stream_is_an_event_without_a_token(start: Start) -> None:
    server = start()
    calls = iter(range(100))

    def break_third(*_: object) -> None:
        if next(calls) == 2:
            raise ValueError("boom")

    server.model.lm_head.register_forward_hook(break_third)
    response = server.post("/generate_stream")
    found = events(response)
    assert response.status_code == 200
    assert [set(event) for event in found] == [{"token", "generated_text", "details"}] * 2 + [
        {"error", "error_type"}
    ]
    assert found[-1]["error_type"] == "generation" and "ValueError: boom" in found[-1]["error"]


def test_a_full_server_answers_429(start: Start) -> None:
    server = start(max_batch=1, max_queue=0)
    response = server.post()
    assert response.status_code == 429
    assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert response.headers["retry-after"] == "1"
    server.engine.close()
    response = server.post()
    assert (response.status_code, response.json()["error_type"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) > 0


def test_many_clients_at_once_each_get_their_own_text(start: Start, shared: Bundle) -> None:
    server = start(max_batch=4)
    put(server, shared)
    who = ["alice", "bob", "žofie", ""] * 3
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        found[index] = server.post(adapter_id=who[index]).json()["generated_text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(who))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, user in enumerate(who):
        reference = shared.reconstruct(user) if user else None
        assert found[index] == tiny.peft_text(tiny.llama(), PROMPT, reference, tokens=6)


def test_health_and_info(start: Start, shared: Bundle) -> None:
    server = start()
    bundle_id = put(server, shared)
    for path in ("/", "/health", "/ping"):
        response = server.client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    info = server.client.get("/info").json()
    assert info["server"] == "soppu"
    assert (info["model_id"], info["base_hash"], info["active_bundle"]) == ("tiny", tiny.BASE_HASH, bundle_id)
    assert (info["max_total_tokens"], info["max_input_length"], info["max_stop_sequences"]) == (128, 127, 4)
    server.engine.close()
    response = server.client.get("/health")
    assert (response.status_code, response.json()["error_type"]) == (503, "healthcheck")


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


def test_a_stored_adapter_that_is_not_the_one_that_was_put_is_refused_at_the_start(
    start: Start, members: dict[str, LoraAdapter], tmp_path: Path
) -> None:
    server = start()
    for name, who in (("dave", "alice"), ("erin", "bob")):
        server.client.put(f"/soppu/v1/adapters/{name}", content=tar(members[who]))
    server.state.close()
    path = tmp_path / "state" / "state.json"
    state = json.loads(path.read_text())
    kept = dict(state["adapters"])
    folder = tmp_path / "state" / "adapters" / kept["dave"]

    def opened() -> list[str]:
        bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
        ServerState.open(tmp_path / "state", bank).close()
        return sorted(bank.adapters())

    assert opened() == ["dave", "erin"]
    path.write_text(json.dumps(state | {"adapters": {"dave": kept["erin"], "erin": kept["dave"]}}))
    with pytest.raises(AdapterError, match="not the one that was put as 'dave'; move the state folder away"):
        opened()
    path.write_text(json.dumps(state))
    adapters.write(members["bob"], folder)
    with pytest.raises(AdapterError, match="not the one that was put as 'dave'"):
        opened()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        opened()


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


def tar(
    adapter: LoraAdapter, *, extra: dict[str, bytes] | None = None, drop: str = "", prefix: str = "./"
) -> bytes:
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as out:
        adapters.write(adapter, Path(folder))
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path in sorted(Path(folder).iterdir()):
                if path.name != drop:
                    archive.add(path, arcname=prefix + path.name)
            for name, data in (extra or {}).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return out.getvalue()


def test_an_adapter_is_put_as_a_tar_served_replaced_and_deleted(
    start: Start, members: dict[str, LoraAdapter], tmp_path: Path
) -> None:
    server = start()
    url = "/soppu/v1/adapters/team/dave"
    for who in ("alice", "bob", "bob"):
        assert server.client.put(url, content=tar(members[who], extra={"README.md": b"x"})).status_code == 201
        expected = tiny.peft_text(tiny.llama(), PROMPT, members[who], tokens=6)
        response = server.post(adapter_id="team/dave")
        assert response.json()["generated_text"] == expected
        assert response.headers["x-adapter-version"] == members[who].content_hash()
        assert len(list((tmp_path / "state" / "adapters").iterdir())) == 1
    listing = server.client.get("/soppu/v1/adapters").json()["adapters"]
    assert listing == [
        {"name": "team/dave", "content_hash": members["bob"].content_hash(), "rank": 3, "base_verified": True}
    ]
    assert server.client.delete(url).status_code == 200
    assert server.client.delete(url).status_code == 404
    assert server.post(adapter_id="team/dave").status_code == 424
    assert list((tmp_path / "state" / "adapters").iterdir()) == []


def test_a_tar_with_anything_unexpected_is_refused_and_leaves_nothing(
    start: Start, members: dict[str, LoraAdapter], tmp_path: Path
) -> None:
    server = start()
    good = members["alice"]
    link = tarfile.TarInfo("adapter_config.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(link)
        symlink = out.getvalue()
    cases = {
        tar(good, extra={"../escape": b"x"}): "'../escape'",
        tar(good, extra={"/tmp/escape": b"x"}): "'/tmp/escape'",
        tar(good, extra={"pickle.bin": b"x"}): "'pickle.bin'",
        tar(good, extra={"adapter_config.json": b"x"}): "'adapter_config.json'",
        tar(good, drop="adapter_model.safetensors"): "lacks adapter_model.safetensors",
        tar(good, prefix="deep/"): "'deep/adapter_config.json'",
        symlink: "'adapter_config.json'",
        b"not a tar at all" * 100: "not an uncompressed tar",
        tar(good)[:3000]: "",
        tar(tiny.lora(tiny.gpt2(), seed=1)): "no such module",
        tar(tiny.lora(tiny.llama(), seed=1, base_hash="c" * 64)): "made for base model",
    }
    for data, words in cases.items():
        response = server.client.put("/soppu/v1/adapters/dave", content=data)
        assert response.status_code == 422, words
        assert words in response.json()["error"]
    assert server.client.put("/soppu/v1/adapters/a%09b", content=tar(good)).status_code == 422
    assert server.bank.adapters() == {}
    assert [path.name for path in (tmp_path / "state").rglob("*") if path.is_file()] == ["lock"]


def test_a_sparse_member_or_too_much_of_it_is_refused(
    members: dict[str, LoraAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tarfile.TarInfo("adapter_config.json")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    sparse.size = 1
    archive = tmp_path / "sparse.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(sparse, io.BytesIO(b"{"))
    with pytest.raises(AdapterError, match=r"'adapter_config.json': expected one plain file"):
        unpack_adapter(archive, tmp_path / "folder")
    archive.write_bytes(tar(members["alice"]))
    monkeypatch.setattr("soppu.serve.api.uploads.MOST_BYTES", 1000)
    with pytest.raises(AdapterError, match=r"the tar holds \d+ bytes, at most 1000 are taken"):
        unpack_adapter(archive, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_upload_the_disk_refuses_is_a_507_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    server = start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # stands for a full disk
    try:
        response = server.client.put("/soppu/v1/adapters/dave", content=b"x" * (2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (response.status_code, response.json()["error_type"]) == (507, "storage")
    assert "the upload cannot be stored: [Errno 27]" in response.json()["error"]
    assert list((tmp_path / "state" / "incoming").iterdir()) == []


def test_health_tells_of_an_engine_whose_batches_all_fail(start: Start) -> None:
    server = start()
    server.model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    for status in (200, 200, 503):
        assert server.post().status_code == 424
        assert server.client.get("/health").status_code == status


def slow_model(seen: list[int], hurry: threading.Event) -> PreTrainedModel:
    """A model that takes a tenth of a second a token, until it is told to hurry."""
    model = tiny.llama()

    def wait(*_: object) -> None:
        seen.append(1)
        hurry.wait(0.1)

    model.lm_head.register_forward_hook(wait)
    return model


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_frees_its_row(path: str, tmp_path: Path) -> None:
    seen: list[int] = []
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
    with tiny.served(slow_model(seen, threading.Event()), tmp_path / "state", max_batch=1) as url:
        with pytest.raises((requests.Timeout, StopIteration)):
            with requests.post(url + path, json=body, stream=True, timeout=0.3) as response:
                next(response.iter_lines())
                raise StopIteration
        body["parameters"] = {"max_new_tokens": 1}
        assert requests.post(f"{url}/generate", json=body, timeout=30).status_code == 200
    assert len(seen) < 90


def test_a_client_that_goes_away_leaves_the_batch_to_the_others(tmp_path: Path) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
    hurry = threading.Event()
    with tiny.served(slow_model([], hurry), tmp_path / "state", max_batch=4) as url:
        with requests.post(f"{url}/generate_stream", json=body, stream=True, timeout=30) as stays:
            lines = stays.iter_lines()
            next(lines)
            with requests.post(f"{url}/generate_stream", json=body, stream=True, timeout=30) as goes:
                begun = goes.iter_lines()  # held: without it requests hangs up at once
                next(begun)
                assert requests.get(f"{url}/info", timeout=30).json()["running"] == 2
            deadline = time.monotonic() + 10
            while requests.get(f"{url}/info", timeout=30).json()["running"] != 1:
                assert time.monotonic() < deadline
            hurry.set()
            assert sum(line.startswith(b"data:") for line in lines) >= 90


def test_a_silent_stream_is_kept_alive_with_comments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soppu.serve.api.streams._KEEP_ALIVE_SECONDS", 0.05)
    server = start()
    server.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.2))
    text = server.post("/generate_stream", max_new_tokens=2).text
    assert text.startswith(":\n\n") and text.count("data: ") == 2


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
