from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from soppu import adapter
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.bundle import envelope, schema
from soppu.compress.codec import modes
from soppu.compress.codec.streams import LARGEST_FLOAT
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import unit
from soppu.compress.options import ratio
from soppu.errors import BundleError
from tests.soppu.compress import handmade
from tests.soppu.compress.mutate import File

TINY = {"q": (4, 3)}
ASKED = {
    "residual": CompressOptions(max_error=0.2),
    "svd": CompressOptions(method="svd", max_error=0.1),
    "joint": CompressOptions(method="joint", rank=6),
    "joint in floats": CompressOptions(method="joint", rank=4, basis_bits=16, core_bits=32),
    "joint-diag": CompressOptions(method="joint-diag", rank=4),
    "cluster": CompressOptions(method="cluster", rank=3, clusters=2),
    "ternary": CompressOptions(method="ternary", density=0.4),
}
every_method = pytest.mark.parametrize("options", ASKED.values(), ids=ASKED.keys())
every_plan = pytest.mark.parametrize("plan", handmade.PLANS.values(), ids=handmade.PLANS.keys())


@pytest.fixture(scope="module")
def bundle(fleet) -> Bundle:
    return compress(fleet((2, 1, 2)), CompressOptions(method="joint", rank=6))


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


def refused(data: bytes, *words: str) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.from_bytes(data, source="some.file")
    message = str(caught.value)
    assert message.startswith("some.file: ") and all(word in message for word in words), message
    return message


@every_method
def test_save_and_load_are_the_identity(fleet, options, tmp_path: Path):
    adapters = fleet((2, 1, 2), shapes={"model.layers.0.q": (60, 50), "model.layers.1.down": (40, 70)})
    bundle = compress(adapters, options)
    path = tmp_path / "deep" / "x.safetensors"
    bundle_id = bundle.save(path)
    assert bundle_id == hashlib.sha256(path.read_bytes()).hexdigest()
    again = Bundle.load(path, expected_hash=bundle_id)
    assert again.to_bytes() == bundle.to_bytes() == path.read_bytes()
    assert len(bundle.to_bytes()) == path.stat().st_size
    assert bundle.report.parameters_before == sum(a.parameters() for a in adapters.values())
    assert ratio(bundle.report.parameters_before, path.stat().st_size) > 0
    for name in ("users", "adapter_ids", "base_model", "base_hash", "fan_in_fan_out", "shapes", "pages"):
        assert getattr(again, name) == getattr(bundle, name)
    for name in ("ranks", "cluster", "norm"):
        assert torch.equal(getattr(again, name), getattr(bundle, name))
    for user in bundle.users:
        for name, pair in bundle.reconstruct(user).pairs.items():
            other = again.reconstruct(user).pairs[name]
            assert torch.equal(pair.A, other.A) and torch.equal(pair.B, other.B)


@every_method
def test_the_report_survives_but_for_the_clock_and_the_rounding_of_errors(fleet, options):
    bundle = compress(fleet((2, 1, 2), shapes={"a": (60, 50), "b": (40, 70)}), options)
    again = Bundle.from_bytes(bundle.to_bytes()).report
    assert again.settings() == bundle.report.settings() and again.seconds == 0
    assert (again.k_used, again.steps) == (bundle.report.k_used, bundle.report.steps)
    assert again.relative_error == pytest.approx(bundle.report.relative_error, rel=1e-6)
    for name, errors in bundle.report.module_error.items():
        assert again.module_error[name] == pytest.approx(errors, rel=1e-3, abs=1e-6)
        assert again.certificates[name].total == pytest.approx(bundle.report.certificates[name].total)


def test_the_same_adapters_give_the_same_bytes(fleet):
    options = CompressOptions(method="joint", rank=6)
    first, second = compress(fleet((2, 1, 2)), options), compress(fleet((2, 1, 2)), options)
    assert first.to_bytes() == second.to_bytes()


@every_plan
def test_reconstruct_is_the_sum_of_the_stored_components(plan):
    bundle = handmade.make(plan)
    for index, user in enumerate(bundle.users):
        again = bundle.reconstruct(user)
        for name, part in bundle.of(user).items():
            o, i = bundle.shapes[name]
            u, v = bundle.matrices(name, int(bundle.cluster[index]))
            expected = torch.zeros(o, i)
            for j in range(len(part)):
                left, right = vector(part.left, j, u, o), vector(part.right, j, v, i)
                expected += bundle.norm[index] * part.gain[j] * torch.outer(left, right)
            torch.testing.assert_close(again.pairs[name].delta(), expected, rtol=1e-4, atol=1e-4)


def vector(side: Any, j: int, basis: Tensor | None, d: int) -> Tensor:
    """u_j = U a_j + beta_j p_j / ||p_j||, from the tensors of one side."""
    made = torch.zeros(d)
    if side.coords_width[j]:
        assert basis is not None
        made += basis @ side.coordinates(basis.shape[1])[j]
    if side.own_width[j]:
        own = side.own[int((side.own_width[:j] > 0).sum())]
        made += side.beta[j] * unit(own[None])[0]
    return made


def test_full_cores_reconstruct_at_rank_k(fleet):
    bundle = compress(fleet((3, 2)), CompressOptions(method="joint", rank=4))
    pair = bundle.reconstruct("user1").pairs["model.layers.0.q"]
    assert pair.rank == 4
    assert int(torch.linalg.matrix_rank(pair.delta(), rtol=1e-2)) == 2


def test_a_module_whose_components_were_all_left_out_is_zero():
    bundle = handmade.make(handmade.PLANS["pages"])
    pair = bundle.reconstruct("user1").pairs["q"]
    assert (pair.B.shape, pair.A.shape) == ((7, 1), (1, 5)) and not pair.delta().any()
    assert "q" not in bundle.reconstruct("user2").pairs


def test_users_of_any_page_are_found():
    bundle = handmade.make(handmade.PLANS["pages"])
    assert [(page.first, page.users) for page in bundle.pages] == [(0, 2), (2, 1)]
    sizes = {user: [len(part) for part in bundle.of(user).values()] for user in ("user2", "user0", "user1")}
    assert sizes == {"user0": [1, 1], "user1": [0, 0], "user2": [1]}


def test_users_are_reconstructed_in_the_bases_of_their_cluster():
    bundle = handmade.make(handmade.PLANS["two clusters"])
    assert bundle.cluster.tolist() == [0, 1, 0]
    (first, _), (second, _) = (bundle.matrices("q", cluster) for cluster in (0, 1))
    assert first is not None and second is not None and not torch.equal(first, second)
    delta = bundle.reconstruct("user0").pairs["q"].delta()
    torch.testing.assert_close(first @ torch.linalg.lstsq(first, delta).solution, delta, rtol=1e-3, atol=1e-3)
    outside = second @ torch.linalg.lstsq(second, delta).solution - delta
    assert float(outside.norm()) > 0.1 * float(delta.norm())


def test_a_reconstructed_adapter_is_written_and_read_as_a_peft_folder(bundle, tmp_path: Path):
    again = bundle.reconstruct("user1")
    adapter.write(again, tmp_path / "peft")
    assert adapter.read(tmp_path / "peft").content_hash() == again.content_hash()


def test_an_unknown_user_is_named(bundle):
    with pytest.raises(BundleError, match="unknown user 'nobody'; the bundle holds 3 users"):
        bundle.reconstruct("nobody")


def test_user_names_are_kept_as_they_are(fleet):
    names = ["zoë", "a/b", 'say "x"', "content", "用户", "page.0", " ", "\U0001f600", "a\nb\0"]
    made = fleet((1,) * len(names), shapes=TINY)
    bundle = compress(dict(zip(names, made.values(), strict=True)), CompressOptions(method="joint", rank=2))
    assert Bundle.from_bytes(bundle.to_bytes()).users == tuple(names)


def test_the_file_is_plain_safetensors(bundle):
    tensors = load(bundle.to_bytes())
    types = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    streams = ("meta", "bases", "ranks", "cluster", "page.0")
    assert types == dict.fromkeys(streams, (torch.uint8, 1)) | {
        "norm": (torch.float32, 1),
        "error": (torch.float32, 1),
        "module_error": (torch.float16, 2),
        "certificates": (torch.float32, 2),
    }


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


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
EXAMPLE, DIGEST, READER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def shown() -> bytes:
    scope: dict[str, Any] = {}
    exec(EXAMPLE, scope)
    return bytes(scope["data"])


def test_the_format_page_shows_a_file_as_it_is_written_today():
    data = shown()
    assert f"{len(data):,} bytes" in PAGE
    bundle = Bundle.from_bytes(data)
    assert bundle.to_bytes() == data
    deltas = {user: bundle.reconstruct(user).pairs["q"].delta() for user in bundle.users}
    for user, (scale, j) in {"ada": (2, 0), "bo": (3, 0), "cy": (1, 1)}.items():
        expected = torch.zeros(4, 3)
        expected[j, j] = scale
        torch.testing.assert_close(deltas[user], expected)


def test_the_format_page_shows_the_bytes_of_its_file_and_names_every_key():
    data = shown()
    rows = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{2,4} )+)", PAGE, re.MULTILINE)
    assert len(rows) > 15
    for offset, row in rows:
        shown_here = bytes.fromhex(row)
        assert data[int(offset, 16) :][: len(shown_here)] == shown_here
    table, metadata = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    header = json.loads(data[8 : 8 + header_length(data)])
    del header["__metadata__"]
    assert table == header
    inner = File.open(data).inner
    assert metadata == inner == json.loads(zlib.decompress(load(data)["meta"].numpy().tobytes()))
    certificate = [field.name for field in fields(Certificate)]
    keys = {*inner, *inner["modules"][0], *inner["report"], *table, *certificate, "format", "content"}
    assert all(f"`{key}`" in PAGE for key in keys)


@pytest.mark.parametrize("name", ["example", *(name for name in handmade.PLANS if name != "ternary")])
def test_the_reader_on_the_format_page_finds_what_a_bundle_holds(name):
    data = shown() if name == "example" else handmade.make(handmade.PLANS[name]).to_bytes()
    scope: dict[str, Any] = {"data": data}
    for snippet in (DIGEST, READER):
        exec(snippet, scope)
    bundle, seen = Bundle.from_bytes(data), 0
    for user in bundle.users:
        for module, pair in bundle.reconstruct(user).pairs.items():
            delta = torch.zeros(bundle.shapes[module])
            for scale, u, v in scope["components"].get((user, module), []):
                delta += scale * torch.outer(torch.tensor(u), torch.tensor(v))
                seen += 1
            torch.testing.assert_close(pair.delta(), delta, rtol=1e-4, atol=1e-4)
    assert seen == sum(len(part) for number in range(len(bundle.pages)) for part in bundle.components(number))


def test_the_format_page_says_the_limits_and_widths_of_the_code():
    for number in (schema.MOST_FEATURES, schema.MOST_U16, LARGEST_FLOAT, envelope.FORMAT):
        assert f"{number:,.0f}" in PAGE
    coords, own = (", ".join(map(str, widths[1:])) for widths in (modes.COORDS_WIDTHS, modes.OWN_WIDTHS))
    assert f"(none, {coords})" in PAGE and f"(none, {own})" in PAGE
    assert f"It holds {4 + len(modes.NUMBERS)} streams in a row" in PAGE
