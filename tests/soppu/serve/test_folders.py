"""Adapters named by their path in a folder of the server: what is read, what never is, what refusals say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from soppu import adapter as adapters
from soppu.adapter import CONFIG_FILE, IDENTITY_FILE, SHARED_FILE, WEIGHTS_FILE, LoraAdapter, LoraPair
from soppu.errors import RequestError
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank, Mount
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.layers.factors import BundleSlot, PairSlot
from tests.soppu.serve import tiny

ALICE = "adapters/alice/0f3c9a"
BUNDLE_ID = "a" * 64
PROMPT = "the quick"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return tmp_path / "volume"


@pytest.fixture
def bank(root: Path) -> AdapterBank:
    return make_bank(root)


def make_bank(root: Path) -> AdapterBank:
    return AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, base_model="org/Tiny", mount=Mount(root))


def put(root: Path, path: str = ALICE, *, seed: int = 1, adapter: LoraAdapter | None = None) -> LoraAdapter:
    adapter = adapter or tiny.lora(tiny.llama(), seed=seed)
    adapters.write(adapter, root / path)
    return adapter


def share(folder: Path, basis: Path) -> None:
    """Move every lora_A of a folder into a file elsewhere, hard-linked as `SHARED_FILE`."""
    tensors = load_file(folder / WEIGHTS_FILE)
    if not basis.exists():
        save_file({key: value for key, value in tensors.items() if "lora_A" in key}, basis)
    save_file({key: value for key, value in tensors.items() if "lora_A" not in key}, folder / WEIGHTS_FILE)
    os.link(basis, folder / SHARED_FILE)


def config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(bank: AdapterBank, adapter_id: str, *, status: int = 424) -> str:
    with pytest.raises(RequestError) as caught:
        bank.resolve(adapter_id)
    kind = "generation" if status == 424 else "validation"
    assert (caught.value.status, caught.value.error_type) == (status, kind)
    assert bank.residents() == {}
    return str(caught.value)


def test_users_by_path_and_users_of_a_bundle_in_one_batch_get_the_text_of_peft(
    root: Path,
) -> None:
    model = tiny.llama()
    members = {name: tiny.lora(model, seed=seed) for seed, name in enumerate(("alice", "bob"))}
    shared = tiny.bundle(members)
    paths = {
        f"adapters/{user}/v1": put(root, f"adapters/{user}/v1", seed=7 + n) for n, user in enumerate("xyz")
    }
    references = {**{user: shared.reconstruct(user) for user in members}, **paths, "": None}
    jobs = [*references, *references]
    expected = [tiny.peft_text(model, PROMPT, references[who], tokens=8) for who in jobs]
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    bank.stage(shared, bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(gather_seconds=0.2)) as engine:
        running = [engine.submit(GenerationRequest(PROMPT, who, max_new_tokens=8)) for who in jobs]
        assert [generation.result()[1].text for generation in running] == expected
    assert len(set(expected)) == 6
    assert bank.adapters() == {} and set(bank.residents()) == set(paths)


def test_a_path_is_resolved_to_the_content_of_its_folder_and_is_read_once(
    bank: AdapterBank, root: Path
) -> None:
    made = put(root)
    first = bank.resolve(ALICE)
    assert (first.adapter_id, first.version) == (ALICE, made.content_hash())
    assert isinstance(first.where, PairSlot)
    put(root, seed=2)  # against the contract: a folder that was read is not looked at again
    assert bank.resolve(ALICE).where is first.where
    for same in (f"{ALICE}/", "adapters//alice/./0f3c9a", "./" + ALICE):
        resolved = bank.resolve(same)
        assert resolved.where is first.where and resolved.adapter_id == same
    assert list(bank.residents()) == [ALICE]


def test_a_factor_that_users_share_is_one_file_linked_into_their_folders(
    bank: AdapterBank, root: Path
) -> None:
    model = tiny.llama()
    first = tiny.lora(model, seed=1)
    pairs = {
        name: LoraPair(first.pairs[name].A, pair.B) for name, pair in tiny.lora(model, seed=2).pairs.items()
    }
    second = replace(first, pairs=pairs)
    (root / "basis").mkdir(parents=True)
    for user, adapter in (("alice", first), ("bob", second)):
        put(root, f"adapters/{user}/v1", adapter=adapter)
        share(root / f"adapters/{user}/v1", root / "basis/x.safetensors")
        resolved = bank.resolve(f"adapters/{user}/v1")
        assert resolved.version == adapter.content_hash()
        assert isinstance(resolved.where, PairSlot)
        for name, pair in adapter.pairs.items():
            torch.testing.assert_close(resolved.where.pairs[name].delta(), pair.delta())
    inodes = {(root / f"adapters/{user}/v1" / SHARED_FILE).stat().st_ino for user in ("alice", "bob")}
    assert len(inodes) == 1


def test_a_link_to_the_shared_factor_may_be_symbolic_inside_the_folder(bank: AdapterBank, root: Path) -> None:
    made = put(root)
    share(root / ALICE, root / "x.safetensors")
    (root / ALICE / SHARED_FILE).unlink()
    (root / ALICE / SHARED_FILE).symlink_to("../../../x.safetensors")
    assert bank.resolve(ALICE).version == made.content_hash()


def test_names_of_a_bundle_and_of_single_adapters_win_over_paths(bank: AdapterBank, root: Path) -> None:
    model = tiny.llama()
    paths = ["alice", "team/alice", "dave1", "team/dave"]
    made = {path: put(root, path, seed=n) for n, path in enumerate(paths)}
    assert [bank.resolve(path).version for path in paths] == [made[path].content_hash() for path in paths]
    bank.stage(tiny.bundle({user: tiny.lora(model, seed=9) for user in paths[:2]}), bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    for name in paths[2:]:
        bank.add(name, tiny.lora(model, seed=8))
    for user in paths[:2]:
        assert bank.resolve(user).version == BUNDLE_ID and isinstance(bank.resolve(user).where, BundleSlot)
        assert bank.reading(user) is None
    for name in paths[2:]:
        assert bank.resolve(name).version == bank.adapters()[name].content_hash
    bank.activate("")
    assert bank.resolve("team/alice").version == made["team/alice"].content_hash()


@pytest.mark.parametrize(
    "name", ["../outside", "adapters/../../outside", "/etc/passwd", "//etc/passwd", "a/b/.."]
)
def test_a_path_out_of_the_folder_is_refused_before_any_disk_is_touched(
    bank: AdapterBank, root: Path, name: str
) -> None:
    put(root, "../outside")
    assert "must be a path below the folder of adapters" in refusal(bank, name, status=422)
    with pytest.raises(RequestError):
        bank.reading(name)
    absolute = str(root / ALICE)
    put(root)
    assert repr(absolute) in refusal(bank, absolute, status=422)


@pytest.mark.parametrize("name", ["adapters/a\nb", "adapters/\0", "adapters/\x7f", "adapters/\u2028x"])
def test_control_characters_and_long_names_are_refused(bank: AdapterBank, name: str) -> None:
    assert "control character" in refusal(bank, name, status=422)
    assert "at most 512 characters" in refusal(bank, "adapters/" + "x" * 504, status=422)


def test_the_longest_name_of_a_folder_may_be_a_users(bank: AdapterBank, root: Path) -> None:
    path = f"adapters/{'u' * 255}/0f3c9a0f3c9a0f3c"
    assert put(root, path).content_hash() == bank.resolve(path).version
    assert "cannot be read: File name too long" in refusal(make_bank(root), f"adapters/{'u' * 256}/v1")


@pytest.mark.parametrize("name", ["a/b", "bob", ".", "./", "././.", "./././"])
def test_ids_too_short_for_lorax_are_refused_with_its_words(bank: AdapterBank, root: Path, name: str) -> None:
    put(root, "a/b")
    put(root, ".")
    message = refusal(bank, name)
    assert (
        f"model_id {name!r} is too short for prefix filtering; nor is it a name: no bundle is active"
        in message
    )


@pytest.mark.parametrize(
    "name", ["adapters/nobody/0f3c9a", "alice", "alice@0f3c", "adapters/alice", "x" * 256]
)
def test_what_is_not_there_is_refused_as_in_lorax(bank: AdapterBank, root: Path, name: str) -> None:
    put(root)
    expected = f"Server error: No valid adapter config file found: tried {name}/{CONFIG_FILE}"
    assert expected in refusal(bank, name) or len(name) == 256


def test_a_file_in_the_place_of_a_folder_a_missing_root_and_missing_weights(
    bank: AdapterBank, root: Path, tmp_path: Path
) -> None:
    put(root)
    assert "No valid adapter config file found" in refusal(bank, f"{ALICE}/{CONFIG_FILE}")
    assert "No valid adapter config file found" in refusal(make_bank(tmp_path / "nowhere"), ALICE)
    (root / ALICE / WEIGHTS_FILE).unlink()
    assert f"No local weights found in {ALICE} with extension .safetensors" in refusal(bank, ALICE)


def _link_folder(root: Path, outside: Path) -> None:
    (root / "adapters/alice").mkdir(parents=True)
    (root / ALICE).symlink_to(outside)


def _link_parent(root: Path, outside: Path) -> None:
    (root / "adapters").mkdir(parents=True)
    (outside.parent / "0f3c9a").symlink_to(outside)
    (root / "adapters/alice").symlink_to(outside.parent)


def _link_file(name: str) -> Callable[[Path, Path], None]:
    def link(root: Path, outside: Path) -> None:
        put(root)
        (root / ALICE / name).unlink(missing_ok=True)
        (root / ALICE / name).symlink_to(outside / name)

    return link


@pytest.mark.parametrize(
    "link",
    [_link_folder, _link_parent, *map(_link_file, (CONFIG_FILE, WEIGHTS_FILE, SHARED_FILE, IDENTITY_FILE))],
    ids=["folder", "parent", CONFIG_FILE, WEIGHTS_FILE, SHARED_FILE, IDENTITY_FILE],
)
def test_links_that_lead_out_are_not_followed(
    bank: AdapterBank, root: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside" / "secret"
    put(outside, ".")
    save_file({}, outside / SHARED_FILE)
    link(root, outside)
    message = refusal(bank, ALICE)
    assert f"adapter {ALICE!r} leads out of the folder of adapters" in message
    assert str(tmp_path) not in message


def test_what_would_block_or_go_in_circles_is_refused(bank: AdapterBank, root: Path) -> None:
    put(root)
    (root / ALICE / SHARED_FILE).symlink_to("../nothing")
    assert f"{SHARED_FILE} is no plain file, or a link to nothing" in refusal(bank, ALICE)
    (root / ALICE / SHARED_FILE).unlink()
    os.mkfifo(root / ALICE / SHARED_FILE)
    assert f"{SHARED_FILE} is no plain file" in refusal(bank, ALICE)
    (root / ALICE / SHARED_FILE).unlink()
    (root / ALICE / WEIGHTS_FILE).unlink()
    os.mkfifo(root / ALICE / WEIGHTS_FILE)
    assert "No local weights found" in refusal(bank, ALICE)
    (root / "circle").symlink_to("circle")
    assert "adapter 'circle' cannot be read: links in a circle" in refusal(bank, "circle")
    assert "adapter 'circle/x' cannot be read: links in a circle" in refusal(bank, "circle/x")


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def _tensors(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / IDENTITY_FILE).unlink()
        tensors = {key: change(key, value) for key, value in load_file(folder / WEIGHTS_FILE).items()}
        save_file(
            {key: value.clone() for key, value in tensors.items() if value is not None}, folder / WEIGHTS_FILE
        )

    return apply


def _base(**changes: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / IDENTITY_FILE).unlink()
        config(folder, **changes)

    return apply


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights-empty": (_cut(WEIGHTS_FILE, 0), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-no-header": (_cut(WEIGHTS_FILE, 7), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-half-header": (_cut(WEIGHTS_FILE, 300), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-half": (_cut(WEIGHTS_FILE, 9000), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "config-empty": (_cut(CONFIG_FILE, 0), f"{CONFIG_FILE}: not JSON"),
    "config-half": (_cut(CONFIG_FILE, 100), f"{CONFIG_FILE}: not JSON"),
    "identity-half": (_cut(IDENTITY_FILE, 10), f"{IDENTITY_FILE}: not JSON"),
    "half-of-the-pairs": (_tensors(lambda k, t: None if "lora_B" in k else t), "lora_B is missing"),
    "other-rank": (lambda folder: config(folder, r=8), "the tensors have rank 3"),
    "other-rank-in-b": (_tensors(lambda k, t: t[:, :2] if "lora_B" in k else t), "do not share a rank"),
    "other-shape": (_tensors(lambda k, t: t[:, :-1] if "lora_A" in k else t), "shape"),
    "not-finite": (_tensors(lambda k, t: t * float("nan")), "holds NaN or Inf"),
    "integers": (_tensors(lambda k, t: t.to(torch.int8)), "holds int8"),
    "other-base": (_base(base_model_name_or_path="org/Other"), "made for base model"),
    "no-base": (_base(base_model_name_or_path=None), "made for base model unknown (no name)"),
    "dora": (lambda folder: config(folder, use_dora=True), "not a plain LoRA adapter: use_dora=True"),
    "other-tensors": (
        lambda folder: put(folder, ".", seed=5) and _restore(folder),
        "belongs to other tensors",
    ),
    "weights-in-parts": (lambda folder: save_file({}, folder / "more.safetensors"), "found more.safetensors"),
    "in-both-files": (lambda folder: os.link(folder / WEIGHTS_FILE, folder / SHARED_FILE), "only one can be"),
}


def _restore(folder: Path) -> None:
    content = json.loads((folder / IDENTITY_FILE).read_text())
    (folder / IDENTITY_FILE).write_text(json.dumps(content | {"content": "0" * 64}))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_torn_or_does_not_fit_is_a_424_with_the_cause(
    bank: AdapterBank, root: Path, fault: str
) -> None:
    put(root)
    damage, cause = FAULTS[fault]
    damage(root / ALICE)
    message = refusal(bank, ALICE)
    assert cause in message and ALICE in message
    assert str(root) not in message  # how the server's disk looks is nobody's affair
    for path in (root / ALICE).iterdir():
        path.unlink()
    made = put(root)  # a failure is not remembered
    assert bank.resolve(ALICE).version == made.content_hash()


def test_an_adapter_of_another_base_hash_or_model_is_refused(bank: AdapterBank, root: Path) -> None:
    put(root, adapter=tiny.lora(tiny.llama(), seed=1, base_hash="c" * 64))
    assert f"{ALICE}: made for base model cccccccccccc" in refusal(bank, ALICE)
    gpt2 = replace(tiny.lora(tiny.gpt2(), seed=1), base_hash=tiny.BASE_HASH)
    put(root, "other", adapter=gpt2)
    assert "the base model has no such module" in refusal(bank, "other")


@pytest.mark.parametrize("served", ["org/Tiny", "/models/base", "./relative/folder", "alias-1"])
def test_the_name_that_info_shows_is_the_name_of_the_base(root: Path, served: str) -> None:
    put(root)
    _base(base_model_name_or_path=served)(root / ALICE)
    mount = Mount(root)
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, base_model=served, mount=mount)
    bank.resolve(ALICE)
    assert not bank.residents()[ALICE].verified


def test_without_a_folder_of_adapters_paths_are_unknown_names(root: Path) -> None:
    put(root)
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    for name in (ALICE, str(root / ALICE), "../x"):
        assert f"adapter {name!r} is not served here; no bundle is active" in refusal(bank, name)


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
