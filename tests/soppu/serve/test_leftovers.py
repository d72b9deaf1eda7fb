"""What a killed server leaves in its state folder is gone after the next start; nobody else's files are."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from soppu import adapter as adapters
from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import BundleError, RequestError, StorageError
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

ADMIN = {"authorization": f"Bearer {tiny.TOKEN}"}


class Killed(BaseException):
    """No handler of ours catches it, as none runs in a process that is killed."""


@pytest.fixture(scope="module")
def one() -> LoraAdapter:
    return tiny.lora(tiny.llama(), seed=1)


@pytest.fixture(scope="module")
def shared(one: LoraAdapter) -> Bundle:
    return tiny.bundle({"alice": one})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def start(root: Path) -> ServerState:
    return ServerState.open(root, AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH))


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def kill_at(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """End the process, as far as the disk can tell, while a file is written that ends like this."""
    whole = files.sync

    def sync(path: Path) -> None:
        if suffix in path.name:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # nor does it clean up
            raise Killed
        whole(path)

    monkeypatch.setattr(files, "sync", sync)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "soppu.json", "state.json"]
)
def test_an_adapter_that_was_being_put_leaves_nothing(
    root: Path, tmp_path: Path, one: LoraAdapter, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    state = start(root)
    adapters.write(one, tmp_path / "kept")
    state.add_adapter("kept", tmp_path / "kept")
    before = everything(root)
    adapters.write(tiny.lora(tiny.llama(), seed=2), tmp_path / "dave")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, f".{file}.")
        state.add_adapter("dave", tmp_path / "dave")
    state.close()
    assert everything(root) - before
    state = start(root)
    assert everything(root) == before and set(state.bank.adapters()) == {"kept"}
    state.close()


@pytest.mark.parametrize("file", [".safetensors.", ".state.json."])
def test_a_bundle_that_was_being_put_leaves_nothing(
    root: Path, tmp_path: Path, shared: Bundle, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    state, bundle_id = start(root), shared.save(tmp_path / "bundle")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, file)
        state.add_bundle(tmp_path / "bundle", bundle_id=bundle_id)
    state.close()
    assert everything(root) > {"lock"}
    start(root).close()
    assert everything(root) == {"lock"}


def test_what_a_killed_delete_left_is_gone_and_an_upload_too(
    root: Path, tmp_path: Path, one: LoraAdapter, shared: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(root)
    adapters.write(one, tmp_path / "dave")
    state.add_adapter("dave", tmp_path / "dave")
    bundle_id = shared.save(tmp_path / "bundle")
    state.add_bundle(tmp_path / "bundle", bundle_id=bundle_id)

    unlink = Path.unlink

    def killed(path: Path, *_: object, **__: object) -> None:
        if path.name.startswith("."):  # what is written beside it is renamed by now
            return unlink(path, missing_ok=True)
        raise Killed

    for forget in (lambda: state.drop_adapter("dave"), lambda: state.drop_bundle(bundle_id)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("shutil.rmtree", killed)
            patch.setattr(Path, "unlink", killed)
            forget()
    (state.incoming / "tmpx").mkdir()
    (state.incoming / "tmpx" / "body").write_bytes(b"a user's numbers")
    state.close()
    assert len(everything(root)) == 2 + 2 + 3 + 1  # lock, state; bundle, its index; adapter; upload
    start(root).close()
    assert everything(root) == {"lock", "state.json"}


def test_files_of_others_stay(root: Path) -> None:
    own = ["server.log", "notes.tmp", "bundles/mine.safetensors", "adapters/alice/adapter_config.json", "x/y"]
    own += [f"bundles/{'0' * 63}.safetensors", ".server.pid.abcdefgh.tmp", "adapters/0123456789abcdef-xyz/a"]
    for name in own:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("a person's")
    start(root).close()
    assert everything(root) == {*own, "lock"}


def test_what_cannot_be_removed_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = root / "bundles" / f"{'a' * 64}.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="aaa.safetensors: .* cannot be"),
    ):
        patch.setattr(Path, "unlink", refuse)
        start(root)
    start(root).close()
    assert not left.exists()


def test_nobody_can_put_a_name_that_cannot_be_asked_for_or_takes_a_users_place(
    root: Path, tmp_path: Path, one: LoraAdapter, shared: Bundle
) -> None:
    state = start(root)
    bundle_id = shared.save(tmp_path / "bundle")
    state.add_bundle(tmp_path / "bundle", bundle_id=bundle_id)
    engine = Engine(tiny.llama(), tiny.tokenizer(), state.bank, EngineOptions())
    app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH, admin_token=tiny.TOKEN), state=state)
    client = TestClient(app, headers=ADMIN)
    before = everything(root)
    names = [
        "",
        "a\n",
        "a\u2028b",
        "x" * 513,
        f"alice@{bundle_id}",
        f"bob@{bundle_id[:6]}",
        f"alice@{'0' * 64}",
    ]
    for name in names:
        answer = client.put(f"/soppu/v1/adapters/{quote(name)}", content=packed(one))
        assert answer.status_code in (404, 422), name
        assert "`name`" in answer.json()["error"] or "\n" in name
        adapters.write(one, tmp_path / "folder")
        with pytest.raises(RequestError, match="`name`"):
            state.add_adapter(name, tmp_path / "folder")
    assert everything(root) == before and not state.bank.adapters()
    for name in ("alice@home", "a@b@zz", "x" * 512, "team/dave", "žofie 🦊"):
        put = client.put(f"/soppu/v1/adapters/{quote(name)}", content=packed(one))
        assert put.status_code == 201, put.text
        assert state.bank.resolve(name).adapter_id == name
    state.close()


@pytest.mark.parametrize("user", ["a\x07", "x" * 513])
def test_a_bundle_of_a_user_who_cannot_be_asked_for_is_refused(
    root: Path, tmp_path: Path, one: LoraAdapter, user: str
) -> None:
    state = start(root)
    bundle_id = tiny.bundle({user: one, "bob": one}).save(tmp_path / "bundle")
    with pytest.raises(BundleError, match="cannot be asked for"):
        state.add_bundle(tmp_path / "bundle", bundle_id=bundle_id)
    assert everything(root) == {"lock"} and not state.bank.bundles()
    state.close()


def packed(adapter: LoraAdapter) -> bytes:
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as out:
        adapters.write(adapter, Path(folder))
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path in Path(folder).iterdir():
                tar.add(path, arcname=path.name)
        return out.getvalue()
