"""What a basis has in common: it is part of its identity, is not trained, and does not travel back."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soppu.compress import Bundle, CompressOptions, edit, joining
from soppu.compress.bundle import envelope
from soppu.compress.cored.run import compress_cores
from soppu.cores import basis_file
from soppu.cores.around import around
from soppu.cores.basis import CoreBasis, validate
from soppu.cores.core import CoreInBasis
from soppu.errors import AdapterError
from soppu.federation import train, wire_core
from soppu.federation.train import Together, TrainOptions
from soppu.federation.trained import Trained
from tests.soppu.cores.test_around import a_shared, beside
from tests.soppu.cores.test_core import a_basis, a_core
from tests.soppu.test_trained import a_start, basis_of, bench, make_blocks, states


def held(basis: CoreBasis, common: int) -> CoreBasis:
    return dataclasses.replace(basis, common=common)


def test_it_is_part_of_what_a_basis_is_and_comes_back_from_a_file(tmp_path: Path) -> None:
    plain = a_basis(4, 5)
    ids = {held(plain, common).id for common in (0, 1, 2)}
    assert len(ids) == 3 and held(plain, 0).id == plain.id
    for basis in (plain, held(plain, 2), around(a_shared(), beside(3))):
        path = tmp_path / basis.id
        basis_file.write(basis, path)
        found = basis_file.read(path)
        assert (found.id, found.common) == (basis.id, basis.common)


@pytest.mark.parametrize("said", [1, -1, 1.5, True, "2"])
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, said: object) -> None:
    path = tmp_path / "basis"
    basis_file.write(held(a_basis(4, 5), 2), path)
    with safe_open(path, framework="pt") as stream:
        ((key, head),) = stream.metadata().items()
    tensors = load_file(path)
    save_file(tensors, path, metadata={key: json.dumps({**json.loads(head), "common": said})})
    with pytest.raises(AdapterError, match=r"belongs to other numbers|common = .*, "):
        basis_file.read(path)


@pytest.mark.parametrize("common", [-1, 5, 4])
def test_more_than_a_side_has_or_all_of_it_is_no_basis(common: int) -> None:
    with pytest.raises(AdapterError, match=rf"common = {common}, allowed: 0 to 4, the fewest"):
        validate(held(a_basis(4, 4), common), who="basis")
    validate(held(a_basis(4, 5), 3), who="basis")


@pytest.mark.parametrize("own", [0, 2])
def test_only_a_users_own_numbers_travel_back_and_the_rest_is_the_servers(own: int) -> None:
    basis = held(a_basis(4, 5), 2)
    start, core = (a_core(basis, own=own, seed=seed) for seed in (3, 4))
    state = wire_core.to_state(core, common=basis.common)
    per_user = sum(out * inn for out, inn in basis.free_shapes().values())
    beside = sum(own * (o + i) for o, i in basis.module_shapes().values())
    assert state[wire_core.NUMBERS].numel() == per_user + beside == wire_core.numbers(basis, own_rank=own)
    placed = wire_core.from_state(state, basis, own_rank=own, who="ann", start=start)
    for name, s in placed.core.cores.items():
        assert torch.equal(s[2:, 2:], core.cores[name][2:, 2:])
        assert torch.equal(s[:2], start.cores[name][:2])
        assert torch.equal(s[:, :2], start.cores[name][:, :2])
    whole = wire_core.from_state(wire_core.to_state(core), basis, own_rank=own, who="server")
    assert whole.core.content_hash() == core.content_hash()
    with pytest.raises(AdapterError, match="the basis says"):  # who sends what is not theirs
        wire_core.from_state(wire_core.to_state(core), basis, own_rank=own, who="ann", start=start)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_bundle_says_it_and_so_does_one_with_a_user_more_or_less(bits: int) -> None:
    basis = held(a_basis(4, 5), 2)
    members = {user: a_core(basis, seed=seed) for seed, user in enumerate(("ann", "bob"))}
    options = CompressOptions(basis_bits=bits, core_bits=bits)
    made = Bundle.from_bytes(compress_cores(members, basis, options).to_bytes())
    found = joining.basis_of(made)
    assert made.common == found.common == 2 and (found.id == basis.id) is (bits == 32)
    core = dataclasses.replace(a_core(basis, seed=9), basis_id=found.id)
    more = joining.join(made, "eve", CoreInBasis(core, found)).bundle
    for bundle in (more, edit.forget(more, "ann")):
        assert joining.basis_of(Bundle.from_bytes(bundle.to_bytes())).id == found.id
    plain = compress_cores({"ann": a_core(a_basis(4, 5))}, a_basis(4, 5), options)
    assert b"common" not in inner(plain) and b'"common":2' in inner(made)


def inner(bundle: Bundle) -> bytes:
    return zlib.decompress(envelope.decode(bundle.to_bytes(), source="")["meta"].numpy().tobytes())


def test_training_leaves_it_bit_for_bit_and_trains_the_rest(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    text = [states(tiny_llama, plan, make_blocks(9, 11, 8, seed=n)) for n in (1, 2)]
    basis = held(basis_of(tiny_llama, plan, 4), 1)
    starts = [a_start(basis, seed=seed) for seed in (3, 4)]
    options = TrainOptions(batch_size=2, learning_rate=1e-2)
    together = Together(top, plan, text, starts=starts, options=options)
    together.advance(3)
    for user, start in enumerate(starts):
        for name, s in together.adapter(user).core.cores.items():
            begun = start.core.cores[name]
            assert torch.equal(s[:1], begun[:1]) and torch.equal(s[:, :1], begun[:, :1])
            assert (s[1:, 1:] - begun[1:, 1:]).abs().min() > 0


def test_a_basis_that_is_learnt_keeps_the_directions_in_common(tiny_llama: PreTrainedModel) -> None:
    plan, top = bench(tiny_llama)
    text = [states(tiny_llama, plan, make_blocks(9, 11))]
    basis = held(basis_of(tiny_llama, plan, 4), 2)
    options = TrainOptions(batch_size=2, learning_rate=1e-2, basis_rate=1e-2)
    together = Together(top, plan, text, starts=[a_start(basis)], options=options)
    together.advance(2)
    found = together.basis()
    assert found.common == 2
    for name, sides in basis.sides.items():
        for before, after in zip(sides, found.sides[name], strict=True):
            assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2:], after[:, 2:])


def test_a_module_with_nothing_but_the_common_part_is_trained_beside_others(
    tiny_llama: PreTrainedModel,
) -> None:
    plan, top = bench(tiny_llama)
    basis = basis_of(tiny_llama, plan, 4)
    sides = {n: s if "down" in n else (s[0][:, :2], s[1][:, :2]) for n, s in basis.sides.items()}
    narrow = held(dataclasses.replace(basis, sides=sides), 2)
    start = a_start(narrow)
    options = TrainOptions(steps=2, learning_rate=1e-2)
    cached = states(tiny_llama, plan, make_blocks(9, 11))
    ended = train.fit(top, plan, cached, start=start, options=options).adapter
    same = {n for n, s in ended.core.cores.items() if torch.equal(s, start.core.cores[n])}
    assert same == {name for name in narrow.sides if "down" not in name}
    assert isinstance(ended, CoreInBasis) and Trained([ended], plan, top.device).drift() is not None
