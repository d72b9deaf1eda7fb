from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.compress import Bundle
from soppu.compress.bundle import container
from soppu.compress.codec import streams
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components
from soppu.compress.options import ratio
from soppu.errors import BundleError
from tests.soppu.compress import handmade, mutate
from tests.soppu.compress.mutate import File
from tests.soppu.compress.refusals import refused

every_plan = pytest.mark.parametrize("plan", handmade.PLANS.values(), ids=handmade.PLANS.keys())


@pytest.fixture(scope="module")
def data() -> bytes:
    return handmade.make(handmade.PLANS["both"]).to_bytes()


def changed(data: bytes, change: Callable[[Any], object]) -> bytes:
    """The file with its metadata changed and the digest made to fit: a lie that is not damage."""
    file = File.open(data)
    change(file.inner)
    return file.close()


def tensors_of(bundle: Bundle) -> list[torch.Tensor]:
    """Everything a bundle holds, as one list of tensors."""
    parts: list[Components] = [part for n in range(len(bundle.pages)) for part in bundle.components(n)]
    fields = ("coords_width", "own_width", "axis", "coords", "own", "beta")
    held = [getattr(side, f) for part in parts for side in (part.left, part.right) for f in fields]
    held += [tensor for part in parts for tensor in (part.user, part.gain)]
    held += [side.rows for clusters in bundle.bases.values() for pair in clusters for side in pair]
    return [*held, bundle.ranks, bundle.cluster, bundle.norm]


@pytest.mark.parametrize("said", [-1, 1.0, True, "1", None, 1000])
def test_more_in_common_than_a_basis_has_is_refused(data: bytes, said: object) -> None:
    refused(changed(data, lambda meta: meta.update(common=said)), "metadata 'common' is", "from 0 to")


@every_plan
def test_what_is_read_is_what_was_written_and_is_written_alike(plan):
    bundle = handmade.make(plan)
    data = container.encode(bundle)
    again = Bundle.from_bytes(data, source="x")
    for name in (
        "users",
        "adapter_ids",
        "base_model",
        "base_hash",
        "fan_in_fan_out",
        "shapes",
        "pages",
        "basis_saw",
    ):
        assert getattr(again, name) == getattr(bundle, name)
    assert all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(tensors_of(again), tensors_of(bundle), strict=True)
    )
    assert list(again.shapes) == list(bundle.shapes)
    assert container.encode(again) == data == container.encode(handmade.make(plan))


@every_plan
def test_the_report_comes_back(plan):
    bundle = handmade.make(plan)
    again = Bundle.from_bytes(container.encode(bundle), source="x").report
    assert again.settings() == bundle.report.settings()
    assert again.relative_error == bundle.report.relative_error  # 0.25 and 0.5 are floats of 16 bits
    assert again.module_error == bundle.report.module_error
    assert (again.steps, again.k_used, again.seconds) == (bundle.report.steps, bundle.report.k_used, 0.0)
    assert list(again.steps) == list(bundle.shapes)


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=4, max_size=4), min_size=2, max_size=2))
def test_certificates_come_back_as_32_bit_floats(rows):
    bundle = handmade.make(handmade.PLANS["own"])
    table = {
        name: Certificate(*row, confidence=1 - 2.0**-20 * place)
        for place, (name, row) in enumerate(zip(bundle.shapes, rows, strict=True))
    }
    changed = replace(bundle, report=replace(bundle.report, certificates=table))
    assert Bundle.from_bytes(container.encode(changed), source="x").report.certificates == table


def test_users_taken_out_are_remembered():
    bundle = replace(handmade.make(handmade.PLANS["own"]), basis_saw=("a-gone", "a-too"))
    assert Bundle.from_bytes(container.encode(bundle), source="x").basis_saw == ("a-gone", "a-too")


def test_bytes_reported_are_bytes_on_disk(tmp_path):
    bundle = handmade.make(handmade.PLANS["both"])
    bundle.save(tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert size == len(bundle.to_bytes())
    assert ratio(bundle.report.parameters_before, size) == 2 * 1000 / size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: replace(b, norm=b.norm * float("nan")), "'norm'"),
        (lambda b: replace(b, norm=-b.norm), "negative"),
        (lambda b: replace(b, ranks=b.ranks + 65_536), "rank 65538, allowed: up to 65535"),
        (lambda b: replace(b, users=("a", "")), "'users'"),
        (lambda b: replace(b, users=("a", "a")), "'users'"),
        (lambda b: replace(b, adapter_ids=("a",)), "'adapter_ids'"),
        (lambda b: replace(b, pages=b.pages[:0]), "'pages'"),
        (lambda b: replace(b, shapes=b.shapes | {"q": (1 << 25, 5)}), "out 33554432"),
        (lambda b: replace(b, report=replace(b.report, seed=1 << 64)), "'seed'"),
        (
            lambda b: replace(b, report=replace(b.report, module_error={"q": {"user0": 1e6}, "down": {}})),
            "Inf",
        ),
    ],
)
def test_a_bundle_no_reader_would_take_is_not_written(change, words):
    with pytest.raises(BundleError, match=words):
        container.encode(change(handmade.make(handmade.PLANS["both"])))


def test_more_components_than_the_rank_allows_are_refused():
    for name, allowed in (("own", 1), ("both", 3)):
        bundle = handmade.make(handmade.PLANS[name])
        low = replace(bundle, ranks=torch.ones_like(bundle.ranks))
        data = container.encode(low)
        if allowed == 1:
            refused(data, "page 0: q: 2 components of 'user0', allowed: 1")
        else:  # the bases allow three
            assert Bundle.from_bytes(data, source="x").users == bundle.users


def test_components_where_the_rank_is_0_are_refused():
    bundle = handmade.make(handmade.PLANS["both"])
    ranks = bundle.ranks.clone()
    ranks[0, 1] = 0
    refused(container.encode(replace(bundle, ranks=ranks)), "q: ", "'user1'", "rank is 0")


def test_a_user_without_any_module_is_refused():
    bundle = handmade.make(handmade.PLANS["pages"])
    ranks = bundle.ranks.clone()
    ranks[:, 1] = 0
    refused(container.encode(replace(bundle, ranks=ranks)), "user 'user1' has no module")


def test_a_cluster_that_does_not_exist_is_refused():
    bundle = handmade.make(handmade.PLANS["two clusters"])
    refused(container.encode(replace(bundle, cluster=bundle.cluster + 1)), "cluster 2, there are 2")


def test_a_gain_that_leaves_the_range_of_floats_is_refused():
    made = (handmade.make(handmade.PLANS["floats"], seed=seed) for seed in range(99))
    bundle = next(one for one in made if float(one.components(0)[0].gain[0].abs()) > 1.5)
    refused(container.encode(replace(bundle, norm=torch.full((2,), 3e38))), "gain times a norm")


def test_numbers_that_are_not_json_are_refused(data):
    for text in ("NaN", "-Infinity", "1e999", "1" * 5000):
        file = File.open(data)
        refused(file.close(retext=lambda t, text=text: t.replace('"seed":0', f'"seed":{text}')), "not JSON")


def test_a_key_that_is_there_twice_is_refused(data):
    twice = File.open(data).close(retext=lambda t: t.replace('"seed":0', '"seed":0,"seed":1'))
    refused(twice, "key 'seed' is there twice")


def test_half_a_character_is_refused(data):
    refused(changed(data, lambda m: m.update(base_model="\ud800")), "not JSON")
    assert (
        Bundle.from_bytes(changed(data, lambda m: m.update(base_model="\U0001f600")), source="x").base_model
        == "😀"
    )


@pytest.mark.parametrize("depth", [50, 900, 100_000])
def test_deep_nesting_is_refused_with_a_short_message(data, depth):
    nested = "[" * depth + "]" * depth
    for key in ("users", "modules", "report", "base_model"):
        made = File.open(data).close(
            retext=lambda t, key=key: t.replace(f'"{key}":', f'"{key}":{nested},"x":', 1)
        )
        assert len(refused(made)) < 200
    unknown = File.open(data).close(retext=lambda t: f'{{"new":{nested},{t[1:]}')
    if depth == 50:
        assert Bundle.from_bytes(unknown, source="x").users == ("user0", "user1")
    elif depth == 100_000:
        refused(unknown, "not JSON")


@pytest.mark.parametrize("value", [1 << 24, (1 << 24) + 1, 10**12, 1 << 63, 10**300])
def test_sizes_nothing_stands_for_are_refused_without_room_for_them(data, value):
    for key in ("out", "in"):
        tracemalloc.start()
        refused(changed(data, lambda m, key=key: m["modules"][0].update({key: value})))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20
    for key in ("clusters", "pages", "report", "users"):
        refused(changed(data, lambda m, key=key: m.update({key: value})), key)


def test_metadata_that_unfolds_is_refused_without_room_for_it(data):
    file = File.open(data)
    file.inner["new"] = "x" * (1 << 26)
    made = file.close()
    del file
    assert len(made) < 100_000
    tracemalloc.start()
    refused(made, "metadata does not end where it should")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("where", ["ranks", "cluster", "bases", "page.0", "meta"])
def test_a_stream_that_unfolds_is_refused_without_room_for_it(data, where):
    maker = zlib.compressobj(9, zlib.DEFLATED, -15 if where != "meta" else 15)
    bomb = maker.compress(bytes(1 << 26)) + maker.flush()
    file = File.open(data)
    if where in ("bases", "page.0"):
        count = 8 if where == "bases" else 18
        parts = streams.split(file.tensors[where][2], count=count, source="x")
        parts[0] = bomb
        bomb = streams.join(parts)
    file.inner = None if where == "meta" else file.inner
    file.tensors[where] = ("U8", [len(bomb)], bomb)
    made = file.close()
    tracemalloc.start()
    refused(made)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_many_duplicate_and_long_names_take_linear_time_and_short_messages(data):
    keys = ",".join(f'"k{n}":0' for n in range(20_000))
    many = File.open(data).close(retext=lambda t: "{" + keys + ',"k19999":0,' + t[1:])
    assert len(refused(many, "'k19999' is there twice")) < 200
    assert len(refused(changed(data, lambda m: m.update(users=["u" * 100_000] * 2)))) < 300


def test_keys_that_are_not_known_are_ignored(data):
    def more(meta: Any) -> None:
        for held in (meta, meta["modules"][0], meta["report"]):
            held["new"] = {"any": [1, "thing"]}

    assert container.encode(Bundle.from_bytes(changed(data, more), source="x")) == data


SEEDS = {name: handmade.make(plan).to_bytes() for name, plan in handmade.PLANS.items()}


@settings(max_examples=150)
@given(st.sampled_from(sorted(SEEDS)), st.sampled_from(sorted(mutate.KINDS.keys() - {"bomb"})), st.randoms())
def test_changed_files_are_bundles_or_refused(name, kind, rng):
    data = mutate.KINDS[kind](SEEDS[name], rng)
    try:
        bundle = Bundle.from_bytes(data, source="x")
    except BundleError as error:
        assert str(error).startswith("x: ") and len(str(error)) < 1000
        return
    assert Bundle.from_bytes(container.encode(bundle), source="x").users == bundle.users


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    refused(data)
    refused(len(data).to_bytes(8, "little") + data)
    header = json.dumps({"__metadata__": {"soppu": data.decode("latin-1")}}).encode()
    refused(len(header).to_bytes(8, "little") + header)


def test_equal_content_gives_equal_bytes_whatever_the_layout_of_tensors():
    bundle = handmade.make(handmade.PLANS["two clusters"])
    strided = replace(
        bundle, ranks=bundle.ranks.mT.contiguous().mT, norm=torch.stack([bundle.norm] * 2, 1)[:, 0]
    )
    assert container.encode(strided) == container.encode(bundle)
