"""Names to slots: versions side by side, and refusal of what does not belong to the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soppu.adapter import LoraPair
from soppu.errors import AdapterError, BundleError, RequestError, StorageError
from soppu.models import linear_shapes
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.holdings import Holdings
from soppu.serve.layers.factors import BundleSlot, PairSlot
from soppu.serve.names import find_version, split_version
from tests.soppu.serve import handmade, tiny

A, B = "a" * 64, "ab" * 32


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, base_model="org/Tiny")


def bundle(*users: str, seed: int = 0, rank: int = 8):  # type: ignore[no-untyped-def]
    model = tiny.llama()
    members = {user: tiny.lora(model, seed=seed + index) for index, user in enumerate(users)}
    return tiny.bundle(members, rank=rank)


def refusal(bank: AdapterBank, adapter_id: str) -> str:
    with pytest.raises(RequestError) as caught:
        bank.resolve(adapter_id)
    assert (caught.value.status, caught.value.error_type) == (424, "generation")
    message = str(caught.value)
    assert message.startswith(
        f"Request failed during generation: Server error: adapter {adapter_id!r} is not served here; "
    )
    return message


def test_names_resolve_to_the_active_bundle_and_versions_to_any(bank: AdapterBank) -> None:
    bank.stage(bundle("alice", "bob"), bundle_id=A)
    assert "no bundle is active" in refusal(bank, "alice")
    staged = bank.resolve(f"alice@{A}")
    assert isinstance(staged.where, BundleSlot) and staged.version == A
    bank.activate(A)
    assert bank.resolve("alice").where is staged.where
    assert bank.resolve("bob").where.index == 1  # type: ignore[union-attr]
    bank.stage(bundle("bob", "alice"), bundle_id=B)
    assert bank.resolve("alice").version == A
    bank.activate(B)
    assert (bank.resolve("alice").version, bank.resolve("alice").where.index) == (B, 1)  # type: ignore[union-attr]
    assert bank.resolve(f"alice@{A}").where is staged.where
    assert bank.bundles() == {A: ("alice", "bob"), B: ("bob", "alice")}


def test_the_empty_name_is_the_base_model(bank: AdapterBank) -> None:
    resolved = bank.resolve("")
    assert (resolved.where, resolved.version, resolved.adapter_id) == (None, "", "")


def test_prefixes_must_name_one_bundle(bank: AdapterBank) -> None:
    bank.stage(bundle("alice"), bundle_id=A)
    bank.stage(bundle("alice"), bundle_id=B)
    assert bank.resolve("alice@aa").version == A
    assert bank.resolve("alice@ab").version == B
    assert "2 of 2 loaded bundles begin with 'a'" in refusal(bank, "alice@a")
    assert "0 of 2" in refusal(bank, "alice@f")
    assert "holds 1 users, not 'carol'" in refusal(bank, "carol@aa")
    refusal(bank, "alice@")
    refusal(bank, "@aa")


def test_a_user_name_with_an_at_sign_is_found_whole_and_by_version(bank: AdapterBank) -> None:
    bank.stage(bundle("alice@example.com", "alice"), bundle_id=A)
    bank.activate(A)
    assert bank.resolve("alice@example.com").where.index == 0  # type: ignore[union-attr]
    assert bank.resolve(f"alice@example.com@{A}").where.index == 0  # type: ignore[union-attr]
    assert bank.resolve(f"alice@{A}").where.index == 1  # type: ignore[union-attr]


def test_staging_again_changes_nothing_and_the_active_bundle_cannot_be_dropped(bank: AdapterBank) -> None:
    bank.stage(bundle("alice"), bundle_id=A)
    slot = bank.resolve(f"alice@{A}").where
    bank.stage(bundle("alice"), bundle_id=A)
    assert bank.resolve(f"alice@{A}").where is slot
    bank.activate(A)
    with pytest.raises(BundleError, match="is active"):
        bank.drop(A)
    bank.activate("")
    bank.drop(A)
    refusal(bank, f"alice@{A}")
    with pytest.raises(BundleError, match="is not loaded"):
        bank.activate(A)
    with pytest.raises(BundleError, match="is not loaded"):
        bank.drop(A)


def test_a_bundle_of_another_base_is_refused_by_name(bank: AdapterBank) -> None:
    for wrong, name in (("c" * 64, "tiny"), ("", "other"), ("", "else/Tiny"), ("", "")):
        said = wrong[:12] or "unknown"
        with pytest.raises(BundleError, match=f"made for base model {said} .*this server has bbbbbbbbbbbb"):
            bank.stage(replace(bundle("alice"), base_hash=wrong, base_model=name), bundle_id=A)
    assert bank.bundles() == {}


@pytest.mark.parametrize("name", ["tiny", "/models/tiny/", "~/hub/models--org--Tiny/snapshots/0123"])
def test_a_bundle_without_a_hash_is_served_on_the_base_of_its_name(bank: AdapterBank, name: str) -> None:
    bank.stage(replace(bundle("alice"), base_hash="", base_model=name), bundle_id=A)
    assert bank.resolve(f"alice@{A}").version == A


def test_a_bundle_whose_modules_do_not_fit_is_refused_by_module(bank: AdapterBank) -> None:
    good = bundle("alice")
    name = "model.layers.0.mlp.down_proj"
    o, i = good.shapes[name]
    with pytest.raises(BundleError, match="model.layers.9.nope: the base model has no such linear layer"):
        bank.stage(replace(good, shapes={"model.layers.9.nope": (o, i)}), bundle_id=A)
    with pytest.raises(BundleError, match=rf"{name}: shape \(32, 47\), the base model has \(32, 48\)"):
        bank.stage(replace(good, shapes={name: (o, i - 1)}), bundle_id=A)
    with pytest.raises(BundleError, match="model.norm"):
        bank.stage(replace(good, shapes={"model.norm": (o, i)}), bundle_id=A)
    assert bank.bundles() == {}


def test_a_bundle_is_held_in_the_type_of_the_model_and_bases_once_for_a_cluster() -> None:
    model = tiny.llama().bfloat16()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    users = {"alice": [["shared"]], "bob": [["shared"], ["own"]], "carol": [["shared"]]}
    bank.stage(handmade.bundle(linear_shapes(tiny.llama()), users, clusters=[0, 0, 1]), bundle_id=A)
    alice, bob, carol = (bank.resolve(f"{user}@{A}").where for user in users)
    assert isinstance(alice, BundleSlot) and isinstance(bob, BundleSlot) and isinstance(carol, BundleSlot)
    assert alice.modules is bob.modules is carol.modules
    assert (alice.cluster, bob.cluster, carol.cluster) == (0, 0, 1)
    for factors in alice.modules.values():
        tensors = [tensor for one in factors.shared.values() for tensor in (one.U, one.V, one.P, one.Q)]
        tensors += [side for pair in factors.own.bases.values() for side in pair] if factors.own else []
        assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.bfloat16}
    assert any(factors.own for factors in alice.modules.values())


def test_a_peft_adapter_is_served_by_its_name_and_may_be_replaced(bank: AdapterBank) -> None:
    model = tiny.llama()
    bank.add("dave", tiny.lora(model, seed=1, rank=2))
    first = bank.resolve("dave")
    assert isinstance(first.where, PairSlot)
    bank.add("dave", tiny.lora(model, seed=2, rank=4))
    assert bank.resolve("dave").version != first.version
    assert bank.adapters()["dave"].rank == 4 and bank.adapters()["dave"].verified
    bank.remove("dave")
    refusal(bank, "dave")
    with pytest.raises(AdapterError, match="no adapter 'dave'"):
        bank.remove("dave")


def test_an_adapter_of_another_base_or_shape_is_refused(
    bank: AdapterBank, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama()
    with pytest.raises(AdapterError, match="dave: made for base model cccccccccccc"):
        bank.add("dave", tiny.lora(model, seed=1, base_hash="c" * 64))
    good = tiny.lora(model, seed=1)
    wrong = LoraPair(torch.zeros(2, 5), torch.zeros(32, 2))
    with pytest.raises(AdapterError, match=r"q_proj: shape \(32, 5\)"):
        bank.add("dave", replace(good, pairs={"model.layers.0.self_attn.q_proj": wrong}))
    with pytest.raises(AdapterError, match="no such module"):
        bank.add("dave", tiny.lora(tiny.gpt2(), seed=1))
    assert bank.adapters() == {}
    bank.add("other-tool", tiny.lora(model, seed=1, base_hash=""))
    assert not bank.adapters()["other-tool"].verified
    assert "'other-tool' states no base hash" in caplog.text
    for name in ("", "org/other"):
        with pytest.raises(AdapterError, match=r"nobody: made for base model unknown .*--base"):
            bank.add("nobody", replace(tiny.lora(model, seed=1, base_hash=""), base_model=name))


def test_a_name_cannot_mean_two_things(bank: AdapterBank) -> None:
    adapter = tiny.lora(tiny.llama(), seed=1)
    bank.stage(bundle("alice"), bundle_id=A)
    bank.add("alice", adapter)
    with pytest.raises(BundleError, match="user 'alice' has the name of a loaded adapter"):
        bank.activate(A)
    bank.remove("alice")
    bank.activate(A)
    with pytest.raises(AdapterError, match="the active bundle aaaaaaaaaaaa has a user of that name"):
        bank.add("alice", adapter)


@pytest.mark.parametrize("change", ["stage", "activate", "drop", "add", "replace", "remove"])
def test_a_change_is_seen_only_once_it_is_agreed_to(bank: AdapterBank, change: str) -> None:
    bank.stage(bundle("alice"), bundle_id=A)
    bank.add("dave", tiny.lora(tiny.llama(), seed=1))
    changes = {
        "stage": lambda: bank.stage(bundle("bob"), bundle_id=B),
        "activate": lambda: bank.activate(A),
        "drop": lambda: bank.drop(A),
        "add": lambda: bank.add("erin", tiny.lora(tiny.llama(), seed=2)),
        "replace": lambda: bank.add("dave", tiny.lora(tiny.llama(), seed=2)),
        "remove": lambda: bank.remove("dave"),
    }

    def seen() -> tuple[object, ...]:
        hashes = {name: loaded.content_hash for name, loaded in bank.adapters().items()}
        return bank.active, bank.bundles(), hashes

    before, offered = seen(), []

    def refuse(held: Holdings) -> None:  # type: ignore[type-arg]
        hashes = {name: loaded.content_hash for name, loaded in held.adapters.items()}
        offered.append((held.active, {name: tuple(users) for name, users in held.bundles.items()}, hashes))
        assert seen() == before
        raise StorageError("no space")

    bank.commit = refuse
    with pytest.raises(StorageError):
        changes[change]()
    assert seen() == before and offered[0] != before
    bank.commit = None
    changes[change]()
    assert seen() == offered[0]


BUNDLES = ("aa11", "aa22", "bb33")


@pytest.mark.parametrize(
    ("name", "user", "prefix", "bundles"),
    [
        ("alice", "alice", "", []),
        ("alice@", "alice@", "", []),  # nothing is asked for, so not "every bundle"
        ("alice@bb", "alice", "bb", ["bb33"]),
        ("alice@aa", "alice", "aa", ["aa11", "aa22"]),
        ("alice@zz", "alice", "zz", []),
        ("a@b@aa11", "a@b", "aa11", ["aa11"]),  # the last "@" counts
        ("@aa11", "", "aa11", ["aa11"]),
        ("", "", "", []),
    ],
)
def test_a_name_is_a_user_and_the_bundles_it_may_mean(
    name: str, user: str, prefix: str, bundles: list[str]
) -> None:
    assert split_version(name) == (user, prefix)
    assert find_version(name, BUNDLES) == (user, prefix, bundles)


def test_a_user_may_be_asked_for_by_the_name_behind_the_id(bank: AdapterBank) -> None:
    bank.stage(bundle("alice%40example.com", "alice", "zo%C3%AB"), bundle_id=A)
    bank.activate(A)
    for asked in ("alice@example.com", "alice%40example.com", f"alice@example.com@{A[:4]}"):
        assert bank.resolve(asked).where.index == 0  # type: ignore[union-attr]
        assert bank.resolve(asked).adapter_id == asked
    assert bank.resolve("zoë").where.index == 2  # type: ignore[union-attr]
    assert bank.answers("zoë") == bank.answers("zo%C3%AB")
    assert bank.resolve(f"alice@{A[:4]}").where.index == 1  # type: ignore[union-attr]  # that is a version
    refusal(bank, "bob@example.com")
    refusal(bank, "a\u200bb")
