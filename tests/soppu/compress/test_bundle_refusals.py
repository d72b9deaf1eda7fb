"""A bundle that is truncated, damaged, of another kind or at odds with itself is refused by what is wrong."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.bundle import envelope
from soppu.errors import BundleError
from tests.soppu.compress.mutate import File
from tests.soppu.compress.refusals import refused

TINY = {"q": (4, 3)}


@pytest.fixture(scope="module")
def data(fleet) -> bytes:
    """The smallest file worth the name: two users, one module."""
    return compress(fleet((1, 1), shapes=TINY), CompressOptions(method="joint", rank=2)).to_bytes()


def header_length(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def rewritten(
    data: bytes,
    change: Callable[[Any], object] = lambda metadata: None,
    retensor: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> bytes:
    """The file with its metadata or tensors changed and the digest made to fit: a lie that is not damage."""
    file = File.open(data)
    change(file.inner)
    tensors = load(file.close())
    retensor(tensors)
    return envelope.encode(tensors)


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
    named = (
        rewritten(data, lambda m, n=n: m.update(base_model="".join(map(str, range(n))))) for n in range(99)
    )
    data = next(made for made in named if made[7 + header_length(made) :][:1] == b" ")
    assert Bundle.from_bytes(data).users == ("user0", "user1")
    end = 8 + header_length(data)
    refused(data[: end - 1] + b"\n" + data[end:], "spaces")


def test_a_flipped_bit_in_a_tensor_is_called_damage(data):
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


def test_files_of_other_kinds_are_refused():
    zeros = {"x": torch.zeros(2)}
    refused(b"PK\x03\x04" + b"\0" * 100, "not safetensors")
    refused(b"{}" * 40, "not safetensors")
    refused(struct.pack("<Q", 2) + b"\xff\xfe", "UTF-8")
    refused(struct.pack("<Q", 2) + b"[]", "does not end")
    refused(struct.pack("<Q", 10) + b"{" * 9 + b"}", "not JSON")
    refused(struct.pack("<Q", 200_001) + b"[" * 200_000 + b"}", "not JSON")
    refused(struct.pack("<Q", 1 << 63) + b"{}", "header")
    refused(save(zeros), "not a SOPPU bundle")
    refused(save(zeros, metadata={"format": "pt"}), "not a SOPPU bundle")
    refused(save(zeros, metadata={"soppu": "{"}), "not JSON")
    refused(save(zeros, metadata={"soppu": "[]"}), "expected an object")
    refused(save(zeros, metadata={"soppu": '{"format":2}'}), "digest")
    refused(save(zeros, metadata={"soppu": '{"format":2,"k":NaN}'}), "NaN")
    refused(save(zeros, metadata={"soppu": '{"format":2,"k":1e999}'}), "not a finite number")
    refused(save(zeros, metadata={"soppu": '{"format":2,"format":2}'}), "'format' is there twice")
    refused(save({}, metadata={"soppu": "[" * 200_000}), "not JSON")
    refused(save({"x": torch.zeros(2, dtype=torch.int64)}, metadata={"soppu": '{"format":2}'}), "tensor 'x'")
    refused(envelope.encode(zeros), "'meta' is missing")


@pytest.mark.parametrize("version", [0, 1, 3, "1", "2", None, True, 1.0, 2.0, 1.5, [2]])
def test_an_unknown_format_version_is_refused(data, version):
    file = File.open(data)
    file.meta["format"] = version
    refused(file.close(), f"format version {version!r}", "reads 2", "compress the adapters again")


KEYS = [
    *("users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out"),
    *("basis_saw", "clusters", "pages", "modules", "report"),
]


@pytest.mark.parametrize("key", KEYS)
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
        ("basis_saw", [""]),
        ("basis_saw", None),
        ("clusters", 0),
        ("clusters", True),
        ("clusters", 65_536),
        ("pages", []),
        ("pages", [3]),
        ("pages", [2, 0]),
        ("pages", [3, -1]),
        ("pages", [1, True]),
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
        ("name", ""),
        ("name", 5),
        ("out", 0),
        ("out", "4"),
        ("out", 1 << 25),
        ("in", True),
        ("in", 3.0),
        ("k", [5, 2]),
        ("k", [2, 4]),
        ("k", [2, -1]),
        ("k", [2]),
        ("k", 2),
        ("widths", [[7, 8]]),
        ("widths", [[8, 0]]),
        ("widths", [[8]]),
        ("widths", [[8, 8], [8, 8]]),
        ("widths", [8, 8]),
        ("widths", None),
    ],
)
def test_a_module_entry_out_of_range_is_refused(data, key, value):
    refused(
        rewritten(data, lambda metadata: metadata["modules"][0].update({key: value})), "module 0", "expected"
    )


def test_a_module_entry_without_its_keys_is_refused(data):
    refused(rewritten(data, lambda metadata: metadata["modules"][0].pop("widths")), "module 0", "widths")
    refused(rewritten(data, lambda metadata: metadata.update(modules=[7])), "module 0")
    refused(rewritten(data, lambda metadata: metadata["modules"].append(metadata["modules"][0])), "one name")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("bases"), ("bases", "missing")),
        (lambda t: t.pop("page.0"), ("page.0", "missing")),
        (lambda t: t.update({"page.1": t["page.0"].clone()}), ("page.1", "not one")),
        (lambda t: t.update(extra=torch.zeros(1)), ("extra",)),
        (lambda t: t.update(norm=t["norm"].half()), ("norm", "float16", "float32")),
        (lambda t: t.update(norm=torch.tensor(1.0)), ("norm", "()")),
        (lambda t: t.update(norm=t["norm"][:1].clone()), ("norm", "(1,)", "(2,)")),
        (lambda t: t.update(norm=t["norm"] * float("inf")), ("norm", "NaN or Inf")),
        (lambda t: t.update(norm=-t["norm"]), ("norm", "negative")),
        (lambda t: t.update(error=t["error"] * float("nan")), ("error", "NaN")),
        (lambda t: t.update(module_error=t["module_error"].mT.contiguous()), ("module_error", "(2, 1)")),
        (lambda t: t.update(certificates=t["certificates"].double()), ("certificates", "float64")),
        (lambda t: t.update(certificates=t["certificates"] + 2), ("certificates", "probability")),
        (lambda t: t.update({"page.0": t["page.0"][None]}), ("page.0", "(bytes,)")),
        (lambda t: t.update({"page.0": t["page.0"][:70].clone()}), ("page 0", "72")),
        (lambda t: t.update(ranks=torch.zeros(0, dtype=torch.uint8)), ("ranks",)),
        (lambda t: t.update(cluster=t["cluster"][:-1].clone()), ("cluster",)),
        (lambda t: t.update(bases=t["bases"].flip(0)), ("bases",)),
        (lambda t: t.update(meta=t["meta"][:-1].clone()), ("metadata",)),
        (lambda t: t.update(meta=torch.cat([t["meta"], t["meta"]])), ("metadata",)),
        (lambda t: t.update(meta=t["meta"].float()), ("meta",)),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_refused(data, change, words):
    refused(rewritten(data, retensor=change), *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("method"),
        lambda report: report.update(rank="many"),
        lambda report: report.update(seed=-1),
        lambda report: report.update(seed=True),
        lambda report: report.update(whitened=0),
        lambda report: report.update(steps=[]),
        lambda report: report.update(steps=[-1]),
        lambda report: report.update(steps={"q": 1}),
    ],
)
def test_a_report_that_does_not_fit_is_refused(data, change):
    refused(rewritten(data, lambda metadata: change(metadata["report"])), "report")


def test_two_tensors_that_change_places_are_damage(data):
    file = File.open(data)
    kept = json.dumps({**file.meta}, sort_keys=True, separators=(",", ":"))
    tensors = load(data)
    tensors["norm"], tensors["error"] = tensors["error"], tensors["norm"]
    refused(save(tensors, metadata={"soppu": kept}), "damaged")
