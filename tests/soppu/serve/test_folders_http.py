"""Adapters named by their path over HTTP: texts, refusals, models, figures, and all a user is served by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from soppu.adapter import WEIGHTS_FILE
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank, Mount
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine
from tests.soppu.serve import tiny
from tests.soppu.serve.mounted import ALICE, BUNDLE_ID, PROMPT, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "volume"


def test_over_http_neighbours_of_a_bad_folder_are_answered_and_sources_are_told_apart(
    root: Path, tmp_path: Path
) -> None:
    good, model = put(root, "adapters/bob/v1", seed=3), tiny.llama()
    expected = tiny.peft_text(model, PROMPT, good, tokens=6)
    put(root)
    os.truncate(root / ALICE / WEIGHTS_FILE, 9000)
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    state = ServerState.open(tmp_path / "state", bank)
    engine = Engine(model, tiny.tokenizer(), bank)
    app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH, admin_token="secret"), state=state)

    with TestClient(app) as client:

        def ask(adapter_id: str, **parameters: object) -> tuple[int, str]:
            body = {
                "inputs": PROMPT,
                "parameters": {"adapter_id": adapter_id, "max_new_tokens": 6, **parameters},
            }
            response = client.post("/generate", json=body)
            content = response.json()
            return response.status_code, content.get("generated_text") or content["error"]

        for source in (
            {},
            {"adapter_source": "local"},
            {"adapter_source": "LOCAL"},
            {"adapter_source": None},
        ):
            assert ask("adapters/bob/v1", **source) == (200, expected)
            status, error = ask(ALICE, **source)
            assert status == 424 and f"{ALICE}/{WEIGHTS_FILE}: truncated" in error
        for source in ("hub", "s3", "PBASE"):
            status, error = ask("adapters/bob/v1", adapter_source=source)
            assert (
                status == 424 and f"Invalid source {source.lower()!r}" in error and "fetches nothing" in error
            )
            assert ask("", adapter_source=source)[0] == 200
        assert ask("../etc")[0] == ask("/etc/passwd")[0] == ask("a\nbcde")[0] == 422
        response = client.post(
            "/generate_stream", json={"inputs": PROMPT, "parameters": {"adapter_id": "adapters/bob/v1"}}
        )
        assert response.headers["x-adapter-id"] == "adapters/bob/v1"
        assert response.headers["x-adapter-version"] == good.content_hash()
        assert client.get("/health").status_code == 200
        headers = {"authorization": "Bearer secret"}
        assert client.get("/soppu/v1/adapters", headers=headers).json() == {"adapters": []}
    state.close()
    assert not (tmp_path / "state" / "state.json").exists()  # a restart reads the folder again


def test_clients_of_openai_name_a_path_as_the_model_and_figures_show_it(root: Path, tmp_path: Path) -> None:
    made, model = put(root), tiny.llama()
    expected = tiny.peft_text(model, PROMPT, made, tokens=6)
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    state = ServerState.open(tmp_path / "state", bank)
    app = create_app(
        Engine(model, tiny.tokenizer(), bank), info=ServerInfo("tiny", tiny.BASE_HASH), state=state
    )
    with TestClient(app) as client:

        def listed() -> list[str]:
            return [entry["id"] for entry in client.get("/v1/models").json()["data"]]

        assert listed() == ["tiny"]
        assert client.get(f"/v1/models/{ALICE}").status_code == 404  # nobody has asked it for a text yet
        body = {"model": ALICE, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == expected
        found = client.get(f"/v1/models/{ALICE}").json()
        assert (found["id"], found["version"], listed()) == (ALICE, made.content_hash(), ["tiny", ALICE])
        hub = client.post("/v1/completions", json=body | {"adapter_source": "hub"})
        assert hub.status_code == 424 and "fetches nothing" in hub.text
        client.post("/v1/completions", json=body | {"model": "adapters/nobody/v1"})
        figures = client.get("/metrics").text
        for line in (
            'soppu_adapters_resident{kind="path"} 1.0',
            f'soppu_adapter_resident{{adapter="{ALICE}"}} 1.0',
            f'soppu_adapter_requests_total{{adapter="{ALICE}",outcome="success"}} 1.0',
            'lorax_request_failure{err="generation"} 2.0',
        ):
            assert line in figures
    state.close()


def test_a_user_is_answered_for_with_version_and_everything_loaded(root: Path, tmp_path: Path) -> None:
    model, other = tiny.llama(), "b" * 64
    for path in ("adapters/alice/v1", "adapters/bob/v1", "alice/adapters/v1", "adapters/jan%20%C5%BE/v1"):
        put(root, path)
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    state = ServerState.open(tmp_path / "state", bank)
    engine = Engine(model, tiny.tokenizer(), bank)
    app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH, admin_token="secret"), state=state)
    client, headers = TestClient(app), {"authorization": "Bearer secret"}

    def answer(user: str) -> dict[str, object] | int:
        response = client.get(f"/soppu/v1/users/{user}", headers=headers)
        return response.json() if response.status_code == 200 else response.status_code

    assert client.get("/soppu/v1/users/alice").status_code == 401
    assert answer("alice") == answer("adapters") == 404 and answer("a%01") == 422
    shared = tiny.bundle({"alice": tiny.lora(model, seed=1), "team/zoë": tiny.lora(model, seed=2)})
    bank.stage(shared, bundle_id=BUNDLE_ID)
    bank.stage(shared, bundle_id=other)
    loaded = [f"alice@{BUNDLE_ID}", f"alice@{other}"]
    nothing = {"user": "alice", "adapter_id": "", "version": "", "active_bundle": "", "loaded": loaded}
    assert answer("alice") == nothing
    bank.activate(other)
    active = {
        "user": "alice",
        "adapter_id": "alice",
        "version": other,
        "active_bundle": other,
        "loaded": loaded,
    }
    assert answer("alice") == active
    assert answer("team/zo%C3%AB")["user"] == "team/zoë"  # type: ignore[index]
    assert answer(f"alice@{other}") == answer("team") == answer("nobody") == 404
    bank.resolve("adapters/alice/v1")
    bank.resolve("adapters/bob/v1")
    assert answer("alice") == active | {"loaded": [*loaded, "adapters/alice/v1"]}
    assert answer("bob") == {
        "user": "bob",
        "adapter_id": "",
        "version": "",
        "active_bundle": other,
        "loaded": ["adapters/bob/v1"],
    }
    bank.resolve("adapters/jan%20%C5%BE/v1")
    assert answer("jan ž")["loaded"] == ["adapters/jan%20%C5%BE/v1"]  # type: ignore[index]
    bank.add("dave", tiny.lora(tiny.llama(), seed=4))
    version = bank.adapters()["dave"].content_hash
    assert answer("dave") == {
        "user": "dave",
        "adapter_id": "dave",
        "version": version,
        "active_bundle": other,
        "loaded": ["dave"],
    }
    state.close()
