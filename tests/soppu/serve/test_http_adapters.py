"""Adapters put over HTTP as tars: served, replaced, deleted; what does not fit leaves nothing behind."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from pathlib import Path

import pytest

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.serve.api.admin import unpack_adapter
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.store import ServerState
from tests.soppu.serve import tiny
from tests.soppu.serve.http_server import PROMPT, Start, members, start, tar

__all__ = ["members", "start"]


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
