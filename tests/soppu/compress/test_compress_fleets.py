"""Which adapters are compressed together, by what ids and base model, and which are refused."""

from __future__ import annotations

import pytest

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import CompressOptions, compress
from soppu.errors import AdapterError

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

EXACT = CompressOptions(method="joint", rank=64, basis_bits=32, core_bits=32)


def test_ids_are_content_hashes_unless_given(fleet):
    adapters = fleet((2, 2))
    given = {"user0": "a-1", "user1": "a-2", "stranger": "a-3"}
    assert compress(adapters, EXACT, adapter_ids=given).adapter_ids == ("a-1", "a-2")
    expected = f"a-{adapters['user0'].content_hash()[:16]}"
    assert compress(adapters, EXACT).adapter_ids[0] == expected
    with pytest.raises(AdapterError, match="user0.*no id"):
        compress(adapters, EXACT, adapter_ids={"user1": "a-1"})


def refused(adapters: dict[str, LoraAdapter], *words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        compress(adapters, EXACT)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_adapters_are_refused():
    refused({}, "no adapters")


def test_adapters_of_two_base_models_are_refused(fleet):
    adapters = fleet((2, 2))
    pairs = adapters["user1"].pairs
    adapters["user1"] = LoraAdapter(pairs, "tiny", "b" * 63 + "c")
    refused(adapters, "user0", "user1", "bbbb")
    adapters["user1"] = LoraAdapter(pairs, "other", "")
    refused(adapters, "user0", "user1", "unknown", "--base")
    adapters["user1"] = LoraAdapter(pairs, "", "")
    refused(adapters, "user0", "user1", "unknown", "no name", "--base")
    adapters = {user: LoraAdapter(pairs, name) for user, name in (("user0", "gpt2"), ("user1", "llama"))}
    refused(adapters, "(gpt2)", "(llama)")
    adapters = {user: LoraAdapter(pairs, fan_in_fan_out=fan) for user, fan in (("x", True), ("y", False))}
    refused(adapters, "fan_in_fan_out", "x", "y")


def test_a_bundle_keeps_the_hash_that_any_of_its_users_knows(fleet):
    adapters = fleet((2, 2, 2))
    known = adapters["user1"].base_hash
    for user, name, base_hash in (
        ("user0", "/models/Tiny/", ""),
        ("user1", "org/tiny", known),
        ("user2", "tiny", ""),
    ):
        adapters[user] = LoraAdapter(adapters[user].pairs, name, base_hash)
    bundle = compress(adapters, CompressOptions(method="joint", rank=4))
    assert (bundle.base_model, bundle.base_hash) == ("/models/Tiny/", known)
    adapters["user3"] = LoraAdapter(adapters["user0"].pairs, "tiny", "c" * 64)  # not the one user1 knows
    refused(adapters, "user3", "user0", "cccc", "bbbb")


def test_modules_of_two_shapes_are_refused(fleet):
    adapters = fleet((2,), shapes={"q": (8, 6)}) | {"wide": fleet((2,), shapes={"q": (8, 7)})["user0"]}
    refused(adapters, "q", "user0", "wide", "(8, 6)", "(8, 7)")


def test_malformed_adapters_are_refused(fleet):
    adapters = fleet((2, 2), shapes={"q": (8, 6)})
    pair = adapters["user1"].pairs["q"]
    for bad, word in (
        (LoraPair(pair.A, pair.B * float("nan")), "NaN"),
        (LoraPair(pair.A[:1], pair.B), "rank"),
        (LoraPair(pair.A[:0], pair.B[:, :0]), "rank 0"),
        (LoraPair(pair.A.double(), pair.B.double() * 1e60), "norm"),
    ):
        refused(adapters | {"user1": LoraAdapter({"q": bad}, "tiny", "b" * 64)}, "user1", "q", word)
    refused(adapters | {"user1": LoraAdapter({}, "tiny", "b" * 64)}, "user1")
