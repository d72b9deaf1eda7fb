"""Files of format 1, written by the code that wrote them, are read to the last number."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import mutate
from benchmarks.mutate import File
from soppu.compress import Bundle
from soppu.errors import BundleError

SAMPLES = json.loads((Path(__file__).parent / "format_1.json").read_text())
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
THIN, FULL = (base64.b64decode(SAMPLES[name]["file"]) for name in ("thin, float16", "full, float32"))


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    file = File.open(data)
    change(file.meta)
    return file.close()


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.from_bytes(data, source="old")
    assert str(caught.value).startswith("old: ") and all(word in str(caught.value) for word in words), (
        caught.value
    )


@every_sample
def test_every_delta_is_the_one_that_was_written(sample):
    bundle = Bundle.from_bytes(base64.b64decode(sample["file"]))
    assert sorted(bundle.users) == sorted(sample["deltas"])
    for user, modules in sample["deltas"].items():
        again = bundle.reconstruct(user)
        assert again.pairs.keys() == modules.keys()
        for name, delta in modules.items():
            expected = torch.tensor(delta, dtype=torch.float64)
            found = again.pairs[name].B.double() @ again.pairs[name].A.double()
            assert float((found - expected).norm()) <= 3e-7 * float(expected.norm()), name


@every_sample
def test_a_file_of_format_1_becomes_one_of_format_2_that_says_the_same(sample):
    old = Bundle.from_bytes(base64.b64decode(sample["file"]))
    data = old.to_bytes()
    assert File.open(data).meta["format"] == 2
    again = Bundle.from_bytes(data)
    assert again.to_bytes() == data
    assert again.report.settings() == old.report.settings()
    for user in old.users:
        for name, pair in old.reconstruct(user).pairs.items():
            other = again.reconstruct(user).pairs[name]
            assert torch.equal(pair.A, other.A) and torch.equal(pair.B, other.B)


@every_sample
def test_the_report_is_kept(sample):
    bundle = Bundle.from_bytes(base64.b64decode(sample["file"]))
    assert bundle.report.relative_error == pytest.approx(sample["relative_error"])
    assert list(bundle.report.relative_error) == list(bundle.users)
    assert bundle.report.method == "joint" and bundle.report.clusters == 1 and not bundle.report.whitened


def test_a_reconstruction_has_the_users_own_rank_where_cores_are_thin():
    bundle = Bundle.from_bytes(
        base64.b64decode(SAMPLES["thin, bfloat16, ranks differ, a module lacking"]["file"])
    )
    ranks = {user: bundle.reconstruct(user).pairs["q"].rank for user in bundle.users}
    assert ranks == {"ada": 2, "bo": 1, "cy": 2}
    assert "v.U" not in bundle.reconstruct("bo").pairs


@pytest.mark.parametrize(
    "key", ["users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out", "dtype", "modules", "report"]
)
def test_metadata_without_a_key_is_refused(key):
    refused(changed(THIN, lambda meta: meta.pop(key)), "lacks", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("users", ["ada", "ada", "cy"]),
        ("users", "ada"),
        ("users", []),
        ("adapter_ids", ["a"]),
        ("base_hash", 5),
        ("fan_in_fan_out", 1),
        ("dtype", "float64"),
        ("dtype", ["float16"]),
        ("modules", {}),
        ("modules", []),
        ("report", None),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused(key, value):
    refused(changed(THIN, lambda meta: meta.update({key: value})), repr(key), "expected")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out", 0),
        ("out", 1 << 25),
        ("in", True),
        ("k", 7),
        ("k", 10**30),
        ("c", 0),
        ("c", "1"),
        ("ranks", [1, 1]),
        ("ranks", [1, 1, -1]),
        ("ranks", [1, 1, 1 << 16]),
        ("ranks", [1, 1, 1.0]),
        ("ranks", None),
    ],
)
def test_a_module_entry_out_of_range_is_refused(key, value):
    refused(changed(THIN, lambda meta: meta["modules"]["q"].update({key: value})), "'q'")


def altered(name: str, dtype: str, shape: list[int], data: bytes) -> bytes:
    file = File.open(THIN)
    file.tensors[name] = (dtype, shape, data)
    return file.close()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (altered("q.U", "F16", [3, 7], bytes(42)), ("q.U", "(3, 7)")),
        (altered("q.U", "F32", [7, 3], bytes(84)), ("q.U", "float32", "float16")),
        (altered("q.P", "F16", [1 << 62, 0, 1], b""), ("q.P",)),
        (altered("q.P", "F16", [3, 3, 1], b"\0\x7e" * 9), ("q.P", "NaN")),
        (altered("q.norm", "F32", [3], struct.pack("<3f", -1, 0, 0)), ("q.norm", "negative")),
        (altered("q.norm", "F32", [3], struct.pack("<3f", 3e38, float("inf"), 0)), ("q.norm", "Inf")),
        (altered("extra", "F32", [], bytes(4)), ("extra",)),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_refused(data, words):
    refused(data, *words)


def test_numbers_that_would_overflow_are_refused():
    file = File.open(FULL)
    dtype, shape, data = file.tensors["q.P"]
    file.tensors["q.P"] = (dtype, shape, struct.pack("<f", 1e38) + data[4:])
    refused(file.close(), "beyond 65504")


def test_a_norm_or_a_user_without_a_module_is_refused():
    refused(changed(THIN, lambda meta: meta["modules"]["q"].update(ranks=[1, 1, 0])), "no module")


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("k_used"),
        lambda report: report.update(k="many"),
        lambda report: report.update(seed=-1),
        lambda report: report.update(method=None),
        lambda report: report.update(relative_error=[]),
        lambda report: report.update(relative_error={"ada": 0.1}),
        lambda report: report.update(relative_error={"ada": 0.1, "bo": -1, "cy": 0}),
        lambda report: report.update(relative_error={"ada": 0.1, "bo": "x", "cy": 0}),
        lambda report: report.update(module_error={"q": {"nobody": 0.1}}),
        lambda report: report.update(steps={"q": 0.5}),
        lambda report: report.update(certificates={"q": {"wrong": 1}}),
        lambda report: report.update(certificates={}),
        lambda report: report["certificates"]["q"].update(total=1e308),
        lambda report: report["certificates"]["q"].update(total=10**400),
        lambda report: report.update(dtype="bfloat16"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(change):
    refused(changed(THIN, lambda meta: change(meta["report"])), "report")


@settings(max_examples=150)
@given(st.sampled_from((THIN, FULL)), st.sampled_from(sorted(mutate.KINDS.keys() - {"bomb"})), st.randoms())
def test_changed_files_are_bundles_or_refused(data, kind, rng):
    try:
        bundle = Bundle.from_bytes(mutate.KINDS[kind](data, rng), source="old")
    except BundleError as error:
        assert str(error).startswith("old: ") and len(str(error)) < 1000
        return
    assert Bundle.from_bytes(bundle.to_bytes()).users == bundle.users
