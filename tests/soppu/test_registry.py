"""The registry's promises of an adapter: put once, never changed, verified, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError, RegistryError, StorageError
from soppu.registry import Registry
from tests.soppu.registries import BASE, folder_of, local, make_adapter, registry, tree

__all__ = ["local", "registry"]


def test_put_is_idempotent_and_the_id_is_the_content(registry: Registry) -> None:
    adapter = make_adapter(1)
    first = registry.put_adapter(adapter, user="alice", run="r1", metrics={"loss": 2.5})
    again = registry.put_adapter(make_adapter(1), user="alice", run="r1", metrics={"gain": 0.5})
    assert first == again == f"a-{adapter.content_hash()[:16]}"
    (row,) = registry.history("alice")
    assert (row.adapter_id, row.run, row.current) == (first, "r1", True)
    assert row.metrics == {"loss": 2.5, "gain": 0.5}
    stored = registry.get_adapter(first)
    assert stored.content_hash() == adapter.content_hash()
    assert (stored.base_model, stored.base_hash) == ("tiny", BASE)


def test_history_keeps_the_order_and_an_old_adapter_can_become_current_again(registry: Registry) -> None:
    old = registry.put_adapter(make_adapter(1), user="alice", run="r1")
    new = registry.put_adapter(make_adapter(2), user="alice", run="r2")
    assert registry.current("alice") == new
    registry.put_adapter(make_adapter(1), user="alice", run="r3")
    assert registry.current("alice") == old
    assert [(row.adapter_id, row.run) for row in registry.history("alice")] == [
        (old, "r1"),
        (new, "r2"),
        (old, "r3"),
    ]
    assert [row.current for row in registry.history("alice")] == [False, False, True]
    (user,) = registry.users()
    assert (user.user, user.adapter_id, user.versions) == ("alice", old, 3)


def test_tensors_changed_after_they_were_hashed_get_the_id_of_what_they_are_now(registry: Registry) -> None:
    adapter = make_adapter(1)
    before = adapter.content_hash()
    adapter.pairs["model.layers.0.self_attn.q_proj"].A.add_(1.0)
    adapter_id = registry.put_adapter(adapter, user="alice")
    assert adapter_id != f"a-{before[:16]}"
    stored = registry.get_adapter(adapter_id).pairs["model.layers.0.self_attn.q_proj"].A
    assert torch.equal(stored, adapter.pairs["model.layers.0.self_attn.q_proj"].A)


def test_what_must_not_be_stored_leaves_no_trace(local: Registry, tmp_path: Path) -> None:
    broken = make_adapter(1)
    broken.pairs["model.layers.1.self_attn.q_proj"].B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="'alice'.*layers.1"):
        local.put_adapter(broken, user="alice")
    with pytest.raises(RegistryError, match="'alice'.*'loss' is nan"):
        local.put_adapter(make_adapter(1), user="alice", metrics={"loss": float("nan")})
    with pytest.raises(RegistryError, match="'al/ice'.*A-Z"):
        local.put_adapter(make_adapter(1), user="al/ice")
    assert local.users() == []
    assert tree(tmp_path / "registry") == {}


def test_two_users_may_hold_one_adapter(registry: Registry) -> None:
    shared = registry.put_adapter(make_adapter(1), user="bob")
    assert registry.put_adapter(make_adapter(1), user="alice") == shared
    registry.put_adapter(make_adapter(2), user="alice")
    assert registry.owner(shared) == ("alice", "bob")
    assert registry.current_set() == {"alice": registry.current("alice"), "bob": shared}


def test_unknown_ids_are_named(registry: Registry) -> None:
    registry.put_adapter(make_adapter(1), user="alice")
    calls = [registry.get_adapter, registry.adapter_bytes, registry.owner]
    calls += [registry.get_set, registry.bundle, registry.bundle_path, registry.bundle_bytes]
    calls += [registry.current, registry.history, registry.forget]
    for call in calls:
        with pytest.raises(RegistryError, match="unknown .*'../a-0'"):
            call("../a-0")


def test_the_folder_loads_in_peft_and_gives_the_merged_logits(registry: Registry) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    names = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    pairs = {
        name: LoraPair(torch.randn(rank, shapes[name][1]) / 4, torch.randn(shapes[name][0], rank) / 4)
        for name, rank in zip(names, (2, 3), strict=True)
    }
    adapter_id = registry.put_adapter(LoraAdapter(pairs, base_hash=BASE), user="alice")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = model(tokens).logits
        for name, pair in pairs.items():
            model.get_submodule(name).weight += pair.delta()
        expected = model(tokens).logits
        for name, pair in pairs.items():
            model.get_submodule(name).weight -= pair.delta()
        loaded = PeftModel.from_pretrained(model, str(folder_of(registry, adapter_id))).eval()
        found = loaded(tokens).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert registry.adapter_bytes(adapter_id) > sum(p.A.nbytes + p.B.nbytes for p in pairs.values())


def _flip_a_weight(folder: Path) -> None:
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_model.safetensors").write_bytes(bytes(data))


def _truncate(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_model.safetensors").write_bytes(data[:-10])


def _scale_it(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").chmod(0o644)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))


def _lose_a_file(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("damage", [_flip_a_weight, _truncate, _scale_it, _lose_a_file])
def test_a_damaged_adapter_is_refused_by_its_id_and_never_overwritten(
    local: Registry, tmp_path: Path, damage: object
) -> None:
    adapter_id = local.put_adapter(make_adapter(1), user="alice")
    damage(tmp_path / "registry" / "adapters" / adapter_id)  # type: ignore[operator]
    before = tree(tmp_path / "registry")
    with pytest.raises(RegistryError, match=adapter_id):
        local.get_adapter(adapter_id)
    with pytest.raises(RegistryError, match=adapter_id):
        local.put_adapter(make_adapter(1), user="bob")
    assert tree(tmp_path / "registry") == before
    assert local.owner(adapter_id) == ("alice",)


def test_an_adapter_swapped_for_another_valid_one_is_refused(local: Registry, tmp_path: Path) -> None:
    mine = local.put_adapter(make_adapter(1), user="alice")
    other = local.put_adapter(make_adapter(2), user="bob")
    folder = tmp_path / "registry" / "adapters"
    (folder / mine).rename(folder / "kept")
    (folder / other).rename(folder / mine)
    with pytest.raises(RegistryError, match=f"{mine}.*content {other[2:]}"):
        local.get_adapter(mine)


def test_a_registry_that_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(tmp_path / "typo", create=False)
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(tmp_path / "typo", catalogue=f"sqlite:///{tmp_path}/typo.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_root_may_be_relative_and_hold_any_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter_id = Registry.open("a b?c%20#d").put_adapter(make_adapter(1), user="alice")
    monkeypatch.chdir("/")
    again = Registry.open(tmp_path / "a b?c%20#d", create=False)
    assert again.current("alice") == adapter_id
    assert folder_of(again, adapter_id).is_relative_to(tmp_path / "a b?c%20#d")


def test_roots_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"memory://x.*needs a catalogue"):
        Registry.open("memory://x")
    with pytest.raises(RegistryError, match=r"nosuch://x"):
        Registry.open("nosuch://x", catalogue=f"sqlite:///{tmp_path}/c.db")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be created"):
        Registry.open(tmp_path / "file" / "registry")


def test_stored_files_are_read_only_and_readable_by_others(local: Registry) -> None:
    folder = folder_of(local, local.put_adapter(make_adapter(1), user="alice"))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}


def test_the_identity_changes_when_something_was_deleted_or_the_registry_made_anew(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    before = registry.identity()
    registry.put_adapter(make_adapter(1), user="alice")
    assert Registry.open(tmp_path / "registry").identity() == before
    registry.forget("alice")
    assert registry.identity() != before
    assert Registry.open(tmp_path / "other").identity() != before
