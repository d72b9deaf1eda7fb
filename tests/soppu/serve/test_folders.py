"""Adapters named by their path in a folder of the server: what is read, and which names never are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soppu.adapter import CONFIG_FILE, SHARED_FILE, WEIGHTS_FILE, LoraPair
from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank, Mount
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.layers.factors import BundleSlot, PairSlot
from tests.soppu.serve import tiny
from tests.soppu.serve.mounted import ALICE, BUNDLE_ID, PROMPT, make_bank, put, refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return tmp_path / "volume"


@pytest.fixture
def bank(root: Path) -> AdapterBank:
    return make_bank(root)


def share(folder: Path, basis: Path) -> None:
    """Move every lora_A of a folder into a file elsewhere, hard-linked as `SHARED_FILE`."""
    tensors = load_file(folder / WEIGHTS_FILE)
    if not basis.exists():
        save_file({key: value for key, value in tensors.items() if "lora_A" in key}, basis)
    save_file({key: value for key, value in tensors.items() if "lora_A" not in key}, folder / WEIGHTS_FILE)
    os.link(basis, folder / SHARED_FILE)


def test_users_by_path_and_users_of_a_bundle_in_one_batch_get_the_text_of_peft(
    root: Path,
) -> None:
    model = tiny.llama()
    members = {name: tiny.lora(model, seed=seed) for seed, name in enumerate(("alice", "bob"))}
    shared = tiny.bundle(members)
    paths = {
        f"adapters/{user}/v1": put(root, f"adapters/{user}/v1", seed=7 + n) for n, user in enumerate("xyz")
    }
    references = {**{user: shared.reconstruct(user) for user in members}, **paths, "": None}
    jobs = [*references, *references]
    expected = [tiny.peft_text(model, PROMPT, references[who], tokens=8) for who in jobs]
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    bank.stage(shared, bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(gather_seconds=0.2)) as engine:
        running = [engine.submit(GenerationRequest(PROMPT, who, max_new_tokens=8)) for who in jobs]
        assert [generation.result()[1].text for generation in running] == expected
    assert len(set(expected)) == 6
    assert bank.adapters() == {} and set(bank.residents()) == set(paths)


def test_a_path_is_resolved_to_the_content_of_its_folder_and_is_read_once(
    bank: AdapterBank, root: Path
) -> None:
    made = put(root)
    first = bank.resolve(ALICE)
    assert (first.adapter_id, first.version) == (ALICE, made.content_hash())
    assert isinstance(first.where, PairSlot)
    put(root, seed=2)  # against the contract: a folder that was read is not looked at again
    assert bank.resolve(ALICE).where is first.where
    for same in (f"{ALICE}/", "adapters//alice/./0f3c9a", "./" + ALICE):
        resolved = bank.resolve(same)
        assert resolved.where is first.where and resolved.adapter_id == same
    assert list(bank.residents()) == [ALICE]


def test_a_factor_that_users_share_is_one_file_linked_into_their_folders(
    bank: AdapterBank, root: Path
) -> None:
    model = tiny.llama()
    first = tiny.lora(model, seed=1)
    pairs = {
        name: LoraPair(first.pairs[name].A, pair.B) for name, pair in tiny.lora(model, seed=2).pairs.items()
    }
    second = replace(first, pairs=pairs)
    (root / "basis").mkdir(parents=True)
    for user, adapter in (("alice", first), ("bob", second)):
        put(root, f"adapters/{user}/v1", adapter=adapter)
        share(root / f"adapters/{user}/v1", root / "basis/x.safetensors")
        resolved = bank.resolve(f"adapters/{user}/v1")
        assert resolved.version == adapter.content_hash()
        assert isinstance(resolved.where, PairSlot)
        for name, pair in adapter.pairs.items():
            torch.testing.assert_close(resolved.where.pairs[name].delta(), pair.delta())
    inodes = {(root / f"adapters/{user}/v1" / SHARED_FILE).stat().st_ino for user in ("alice", "bob")}
    assert len(inodes) == 1


def test_a_link_to_the_shared_factor_may_be_symbolic_inside_the_folder(bank: AdapterBank, root: Path) -> None:
    made = put(root)
    share(root / ALICE, root / "x.safetensors")
    (root / ALICE / SHARED_FILE).unlink()
    (root / ALICE / SHARED_FILE).symlink_to("../../../x.safetensors")
    assert bank.resolve(ALICE).version == made.content_hash()


def test_names_of_a_bundle_and_of_single_adapters_win_over_paths(bank: AdapterBank, root: Path) -> None:
    model = tiny.llama()
    paths = ["alice", "team/alice", "dave1", "team/dave"]
    made = {path: put(root, path, seed=n) for n, path in enumerate(paths)}
    assert [bank.resolve(path).version for path in paths] == [made[path].content_hash() for path in paths]
    bank.stage(tiny.bundle({user: tiny.lora(model, seed=9) for user in paths[:2]}), bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    for name in paths[2:]:
        bank.add(name, tiny.lora(model, seed=8))
    for user in paths[:2]:
        assert bank.resolve(user).version == BUNDLE_ID and isinstance(bank.resolve(user).where, BundleSlot)
        assert bank.reading(user) is None
    for name in paths[2:]:
        assert bank.resolve(name).version == bank.adapters()[name].content_hash
    bank.activate("")
    assert bank.resolve("team/alice").version == made["team/alice"].content_hash()


@pytest.mark.parametrize(
    "name", ["../outside", "adapters/../../outside", "/etc/passwd", "//etc/passwd", "a/b/.."]
)
def test_a_path_out_of_the_folder_is_refused_before_any_disk_is_touched(
    bank: AdapterBank, root: Path, name: str
) -> None:
    put(root, "../outside")
    assert "must be a path below the folder of adapters" in refusal(bank, name, status=422)
    with pytest.raises(RequestError):
        bank.reading(name)
    absolute = str(root / ALICE)
    put(root)
    assert repr(absolute) in refusal(bank, absolute, status=422)


@pytest.mark.parametrize("name", ["adapters/a\nb", "adapters/\0", "adapters/\x7f", "adapters/\u2028x"])
def test_control_characters_and_long_names_are_refused(bank: AdapterBank, name: str) -> None:
    assert "control character" in refusal(bank, name, status=422)
    assert "at most 512 characters" in refusal(bank, "adapters/" + "x" * 504, status=422)


def test_the_longest_name_of_a_folder_may_be_a_users(bank: AdapterBank, root: Path) -> None:
    path = f"adapters/{'u' * 255}/0f3c9a0f3c9a0f3c"
    assert put(root, path).content_hash() == bank.resolve(path).version
    assert "cannot be read: File name too long" in refusal(make_bank(root), f"adapters/{'u' * 256}/v1")


@pytest.mark.parametrize("name", ["a/b", "bob", ".", "./", "././.", "./././"])
def test_ids_too_short_for_lorax_are_refused_with_its_words(bank: AdapterBank, root: Path, name: str) -> None:
    put(root, "a/b")
    put(root, ".")
    message = refusal(bank, name)
    assert (
        f"model_id {name!r} is too short for prefix filtering; nor is it a name: no bundle is active"
        in message
    )


@pytest.mark.parametrize(
    "name", ["adapters/nobody/0f3c9a", "alice", "alice@0f3c", "adapters/alice", "x" * 256]
)
def test_what_is_not_there_is_refused_as_in_lorax(bank: AdapterBank, root: Path, name: str) -> None:
    put(root)
    expected = f"Server error: No valid adapter config file found: tried {name}/{CONFIG_FILE}"
    assert expected in refusal(bank, name) or len(name) == 256


def test_without_a_folder_of_adapters_paths_are_unknown_names(root: Path) -> None:
    put(root)
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    for name in (ALICE, str(root / ALICE), "../x"):
        assert f"adapter {name!r} is not served here; no bundle is active" in refusal(bank, name)
