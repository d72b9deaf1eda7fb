from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from soppu import adapter
from soppu.compress import Bundle, CompressOptions, compress, encoding
from soppu.errors import BundleError

TINY = {"q": (4, 3)}


@pytest.fixture
def bundle(fleet) -> Bundle:
    return compress(fleet((2, 1, 2)), CompressOptions(rank=6))


@pytest.fixture
def data(fleet) -> bytes:
    """The smallest file worth the name: two users, one module."""
    return compress(fleet((1, 1), shapes=TINY), CompressOptions(rank=2)).to_bytes()


def header_length(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def metadata_of(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + header_length(data)])
    return dict(json.loads(header["__metadata__"]["soppu"]))


def rewritten(
    data: bytes,
    change: Callable[[dict[str, Any]], object] = lambda metadata: None,
    retensor: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> bytes:
    """The file with its metadata or tensors changed and the digest made to fit: a lie that is not damage."""
    metadata, tensors = metadata_of(data), load(data)
    change(metadata)
    retensor(tensors)
    return encoding.encode(metadata, tensors)


def refused(data: bytes, *words: str) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.from_bytes(data, source="some.file")
    message = str(caught.value)
    assert message.startswith("some.file: ") and all(word in message for word in words), message
    return message


def test_save_and_load_are_the_identity(bundle, tmp_path: Path):
    path = tmp_path / "deep" / "x.safetensors"
    bundle_id = bundle.save(path)
    assert bundle_id == hashlib.sha256(path.read_bytes()).hexdigest()
    again = Bundle.load(path, expected_hash=bundle_id)
    assert again.to_bytes() == bundle.to_bytes() == path.read_bytes()
    for name in ("users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out", "ranks"):
        assert getattr(again, name) == getattr(bundle, name)
    assert again.report.to_dict() | {"seconds": 0} == bundle.report.to_dict() | {"seconds": 0}
    assert again.report.seconds == 0


def test_the_same_adapters_give_the_same_bytes(fleet):
    options = CompressOptions(rank=6)
    first, second = compress(fleet((2, 1, 2)), options), compress(fleet((2, 1, 2)), options)
    assert first.to_bytes() == second.to_bytes()


def test_reconstruct_is_the_product_of_the_stored_tensors(bundle):
    for user in bundle.users:
        index = bundle.index(user)
        again = bundle.reconstruct(user)
        for name, module in bundle.modules.items():
            product = module.U @ module.core(index) @ module.V.T
            torch.testing.assert_close(again.pairs[name].delta(), product, rtol=1e-4, atol=1e-4)
            assert torch.equal(module.core(index), module.cores()[index])


def test_full_cores_reconstruct_at_rank_k(fleet):
    bundle = compress(fleet((3, 2)), CompressOptions(rank=4))
    module = bundle.modules["model.layers.0.q"]
    assert module.Q is None and module.c is None
    pair = bundle.reconstruct("user1").pairs["model.layers.0.q"]
    assert pair.rank == 4
    torch.testing.assert_close(pair.delta(), module.U @ module.core(1) @ module.V.T)


def test_a_reconstructed_adapter_is_written_and_read_as_a_peft_folder(bundle, tmp_path: Path):
    again = bundle.reconstruct("user1")
    adapter.write(again, tmp_path / "peft")
    assert adapter.read(tmp_path / "peft").content_hash() == again.content_hash()


def test_an_unknown_user_is_named(bundle):
    with pytest.raises(BundleError, match="unknown user 'nobody'; the bundle holds 3 users"):
        bundle.reconstruct("nobody")


def test_user_names_are_kept_as_they_are(fleet):
    names = ["zoë", "a/b", 'say "x"', "content", "用户", "user.q.U", " "]
    made = fleet((1,) * len(names), shapes=TINY)
    bundle = compress(dict(zip(names, made.values(), strict=True)), CompressOptions(rank=2))
    assert Bundle.from_bytes(bundle.to_bytes()).users == tuple(names)


def test_the_file_is_plain_safetensors(bundle):
    tensors = load(bundle.to_bytes())
    parts = {name.removeprefix("model.layers.0.q.") for name in tensors if ".0.q." in name}
    assert parts == {"U", "V", "P", "Q", "norm"}
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    assert all(types[name] == (torch.float32 if name.endswith("norm") else torch.float16) for name in types)


@pytest.mark.parametrize("where", ["empty", "length", "header", "after header", "first tensor", "last byte"])
def test_a_truncated_file_is_refused(data, where):
    length = header_length(data)
    cut = {
        "empty": 0,
        "length": 7,
        "header": 8 + length // 2,
        "after header": 8 + length,
        "first tensor": 8 + length + 3,
        "last byte": len(data) - 1,
    }[where]
    refused(data[:cut], "truncated")


def test_every_truncation_and_every_flipped_byte_is_refused(data):
    for cut in range(0, len(data), 7):
        refused(data[:cut])
    for place in range(len(data)):
        refused(data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :])
    refused(data + b"\0")


def test_padding_other_than_spaces_is_refused(data):
    named = (rewritten(data, lambda m, n=n: m.update(base_model="x" * n)) for n in range(8))
    data = next(made for made in named if made[7 + header_length(made) :][:1] == b" ")
    assert Bundle.from_bytes(data).users == ("user0", "user1")
    end = 8 + header_length(data)
    refused(data[: end - 1] + b"\n" + data[end:], "spaces")


def test_a_flipped_bit_in_a_core_is_called_damage(data):
    refused(data[:-1] + bytes([data[-1] ^ 0x10]), "damaged", "digest")


def test_another_file_than_the_one_expected_is_refused(data, tmp_path: Path):
    path = tmp_path / "bundle"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{path}: SHA-256 is {hashlib.sha256(data).hexdigest()[:12]}"):
        Bundle.load(path, expected_hash="0" * 64)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="none.*cannot be read"):
        Bundle.load(tmp_path / "none")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(tmp_path)


def test_files_of_other_kinds_are_refused(bundle):
    refused(b"PK\x03\x04" + b"\0" * 100, "not safetensors")
    refused(b"{}" * 40, "not safetensors")
    refused(struct.pack("<Q", 2) + b"\xff\xfe", "UTF-8")
    refused(struct.pack("<Q", 2) + b"[]", "does not end")
    refused(struct.pack("<Q", 10) + b"{" * 9 + b"}", "not JSON")
    refused(struct.pack("<Q", 200_001) + b"[" * 200_000 + b"}", "not JSON")
    refused(struct.pack("<Q", 1 << 63) + b"{}", "header")
    refused(save({"x": torch.zeros(2)}), "not a SOPPU bundle")
    refused(save({"x": torch.zeros(2)}, metadata={"format": "pt"}), "not a SOPPU bundle")
    refused(save({"x": torch.zeros(2)}, metadata={"soppu": "{"}), "not JSON")
    refused(save({"x": torch.zeros(2)}, metadata={"soppu": "[]"}), "expected an object")
    refused(save({"x": torch.zeros(2)}, metadata={"soppu": '{"format":1}'}), "digest")
    refused(save({"x": torch.zeros(2)}, metadata={"soppu": '{"format":1,"k":NaN}'}), "NaN")
    refused(save({}, metadata={"soppu": "[" * 200_000}), "not JSON")


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_an_unknown_format_version_is_refused(data, version, monkeypatch):
    monkeypatch.setattr(encoding, "FORMAT", version)
    other = rewritten(data)
    monkeypatch.undo()
    refused(other, "format version", repr(version))


@pytest.mark.parametrize(
    "key", ["users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out", "dtype", "modules", "report"]
)
def test_metadata_without_a_key_is_refused(data, key):
    refused(rewritten(data, lambda metadata: metadata.pop(key)), "lacks", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("users", []),
        ("users", ["user0", "user0"]),
        ("users", ["user0", ""]),
        ("users", ["user0", 1]),
        ("users", "user0"),
        ("adapter_ids", ["a-1"]),
        ("base_model", None),
        ("base_hash", 5),
        ("fan_in_fan_out", 1),
        ("dtype", "float64"),
        ("dtype", ["float16"]),
        ("modules", {}),
        ("modules", []),
        ("report", None),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused(data, key, value):
    refused(rewritten(data, lambda metadata: metadata.update({key: value})), repr(key), "expected")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out", 0),
        ("out", "4"),
        ("in", True),
        ("k", 4),
        ("k", -1),
        ("c", 0),
        ("c", 3),
        ("c", "1"),
        ("ranks", [1]),
        ("ranks", [1, -1]),
        ("ranks", [1, 1.0]),
        ("ranks", [1, False]),
        ("ranks", None),
    ],
)
def test_a_module_entry_out_of_range_is_refused(data, key, value):
    refused(rewritten(data, lambda metadata: metadata["modules"]["q"].update({key: value})), "'q'")


def test_a_module_entry_without_its_keys_is_refused(data):
    refused(rewritten(data, lambda metadata: metadata["modules"].update(q={"k": 2})), "'q'", "ranks")
    refused(rewritten(data, lambda metadata: metadata["modules"].update(q=7)), "'q'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("q.V"), ("q.V", "missing")),
        (lambda t: t.update(extra=torch.zeros(1)), ("extra",)),
        (lambda t: t.update({"q.U": t["q.U"].T.contiguous()}), ("q.U", "(2, 4)", "(4, 2)")),
        (lambda t: t.update({"q.U": t["q.U"].float()}), ("q.U", "float32", "float16")),
        (lambda t: t.update({"q.norm": t["q.norm"].half()}), ("q.norm", "float16")),
        (lambda t: t.update({"q.norm": torch.tensor(1.0)}), ("q.norm", "()")),
        (lambda t: t.update({"q.P": t["q.P"][:1].clone()}), ("q.P", "(1, 2, 2)")),
        (lambda t: t.update({"q.P": t["q.P"] * float("nan")}), ("q.P", "NaN")),
        (lambda t: t.update({"q.norm": t["q.norm"] * float("inf")}), ("q.norm", "NaN or Inf")),
        (lambda t: t.update({"q.norm": -t["q.norm"]}), ("q.norm", "negative")),
        (lambda t: t.update({"q.U": torch.zeros(0, 2)}), ("q.U", "(0, 2)")),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_refused(data, change, words):
    refused(rewritten(data, retensor=change), *words)


def test_a_norm_of_a_user_without_the_module_is_refused(data):
    refused(rewritten(data, lambda metadata: metadata["modules"]["q"].update(ranks=[1, 0])), "rank is 0")


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("k_used"),
        lambda report: report.update(k="many"),
        lambda report: report.update(relative_error=[]),
        lambda report: report.update(relative_error={"user0": 0.1}),
        lambda report: report.update(certificates={"q": {"wrong": 1}}),
        lambda report: report.update(certificates={}),
        lambda report: report.update(dtype="bfloat16"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(data, change):
    refused(rewritten(data, lambda metadata: change(metadata["report"])), "report")


def test_two_tensors_that_change_places_are_damage(data):
    metadata, tensors = metadata_of(data), load(data)
    tensors["q.P"] = tensors["q.P"].flip(0)
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    refused(save(tensors, metadata={"soppu": text}), "damaged")


def test_the_format_page_shows_a_real_file_and_names_every_key():
    page = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
    scope: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, scope)
    data = scope["data"]
    rows = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{2,4} )+)", page, re.MULTILINE)
    assert len(rows) == 11
    for offset, row in rows:
        shown = bytes.fromhex(row)
        assert data[int(offset, 16) :][: len(shown)] == shown
    assert f"{len(data):,} bytes" in page
    table = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert table == {name: entry for name, entry in scope["header"].items()}
    metadata = metadata_of(data)
    report = metadata["report"]
    keys = {*metadata, *metadata["modules"]["q"], *report, *report["overall"], *report["certificates"]["q"]}
    assert len(keys) == 34 and all(f"`{key}`" in page for key in keys)
