"""Bundles of every form behind the engine: logits are those of a dense merge, texts those of PEFT."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import CompressOptions, compress, compress_cores
from soppu.compress.bundle.bundle import Bundle
from soppu.cores.around import around
from soppu.cores.basis import drawn
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.models import linear_shapes
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.decoders.decoder import make_decoder
from soppu.serve.decoders.kv_cache import KVCache, Step
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.layers.routing import Routing
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.handmade import Plan, Sizes
from tests.thorough import thorough

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

FIRST, SECOND = "1" * 64, "2" * 64
USERS: Mapping[str, Plan] = {
    "only shared": [["shared", "shared"]],
    "only own": [["own", "own"]],
    "mixed": [["shared"], ["own"], ["both", "shared"]],
    "one-sided": [["left"], ["right", "left"], ["shared"]],
    "full cores": [["axis"] * 3],
    "few modules": [None, None, None, ["shared"]],
    "no components": [[]],
    "mostly own": [["own"], [], ["shared", "own"], None],
}
FORMS: Mapping[str, Mapping[str, Plan]] = {
    "shared": {"alice": [["shared"] * 2], "bob": [["shared"]], "carol": [["axis"] * 3]},
    "own": {"alice": [["own"] * 2], "bob": [["own"]], "carol": [["own"] * 5]},
    "mixed": USERS,
}
PROMPTS = ["def main():", "the quick", "a"]


def modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in linear_shapes(model).items() if name != "lm_head"}


def merged(model: PreTrainedModel, changes: Mapping[str, Tensor]) -> PreTrainedModel:
    """The base with dense changes (o, i) added to its weights."""
    model = copy.deepcopy(model)
    for name, change in changes.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.weight += (change.T if isinstance(layer, Conv1D) else change).float()
    return model


def related(model: PreTrainedModel) -> dict[str, LoraAdapter]:
    """Adapters that have much, but not all, in common; the last one is of a higher rank and lacks modules."""
    common, g = tiny.lora(model, seed=100), torch.Generator().manual_seed(1)
    users = {}
    for user in range(8):
        mix = torch.randn(3, 3, generator=g)
        own = tiny.lora(model, seed=user)
        users[f"user{user}"] = replace(
            own,
            pairs={
                name: LoraPair(mix @ pair.A + 0.2 * own.pairs[name].A, pair.B + 0.2 * own.pairs[name].B)
                for name, pair in common.pairs.items()
            },
        )
    lone = tiny.lora(model, seed=50, rank=7)
    return users | {"lone": replace(lone, pairs=dict(list(lone.pairs.items())[::2]))}


def served_logits(
    model: PreTrainedModel, bank: AdapterBank, *, adapters: list[str], ids: list[int]
) -> Tensor:
    """Logits (adapters, v) after `ids`, one row for each adapter, in one batch."""
    b = len(adapters)
    decoder = make_decoder(model, bank.router, KVCache(rows=b, limit=len(ids)))
    step = Step(torch.tensor([ids] * b), range(b), starts=[0] * b, counts=[len(ids)] * b)
    return decoder.forward(step, Routing([bank.resolve(adapter).where for adapter in adapters]))


@pytest.mark.parametrize("bits", [32, 8])
def test_cores_around_a_shared_adapter_answer_as_its_own_pairs_do(bits: int) -> None:
    base, model = tiny.model("llama"), tiny.model("llama")
    shared = tiny.lora(base, seed=1)
    shapes = {name: shape for name, shape in modules(base).items() if name.endswith("down_proj")}
    basis = around(shared, drawn(shapes, 6, seed=0, base_hash=tiny.BASE_HASH))  # three directions elsewhere
    begun, g = from_lora(shared, basis).core, torch.Generator().manual_seed(2)
    members = {
        user: replace(
            begun,
            cores={name: s + 0.3 * torch.randn(s.shape, generator=g) for name, s in begun.cores.items()},
        )
        for user in ("alice", "bob")
    }
    options = CompressOptions(method="joint", basis_bits=bits, core_bits=bits)
    made = Bundle.from_bytes(compress_cores(members, basis, options).to_bytes())
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=FIRST)
    ids = [5, 9, 11, 3]
    found = served_logits(model, bank, adapters=[f"alice@{FIRST}", "", f"bob@{FIRST}"], ids=ids)
    for row, user in ((0, "alice"), (1, ""), (2, "bob")):
        core = CoreInBasis(members[user], basis).to_lora() if user else None
        with torch.no_grad():
            wanted = tiny.merged(base, core)(torch.tensor([ids])).logits[0, -1]
        error = float((found[row] - wanted).norm() / wanted.norm())
        assert error < (1e-5 if bits == 32 or not user else 0.05)


@pytest.mark.parametrize("family", ["llama", *thorough("gpt2", "opt")])
@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_logits_of_a_mixed_batch_are_those_of_dense_merges(form: str, clusters: int, family: str) -> None:
    base, model = tiny.model(family), tiny.model(family)
    users = FORMS[form]
    numbers = [place % clusters for place in range(len(users))]
    bundles = {
        FIRST: handmade.bundle(modules(base), users, clusters=numbers, seed=1),
        SECOND: handmade.bundle(
            modules(base), users, clusters=numbers[::-1], sizes=Sizes(k_out=3, k_in=7, page=3), seed=2
        ),
    }
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    for bundle_id, made in bundles.items():
        bank.stage(made, bundle_id=bundle_id)
    cases = [(made, user, f"{user}@{bundle_id}") for bundle_id, made in bundles.items() for user in users]
    cases = [*cases[::2], (None, "", ""), *cases[1::2], *cases[:2]]
    ids = tiny.tokenizer()("the quick")["input_ids"]
    found = served_logits(model, bank, adapters=[adapter for _, _, adapter in cases], ids=ids)
    plain = base(torch.tensor([ids])).logits[0, -1]
    for row, (made, user, adapter) in zip(found, cases, strict=True):
        changes = {name: handmade.meaning(made, user, name) for name in made.shapes} if made else {}
        expected = merged(base, changes)(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3, msg=adapter)
        changed = user not in ("", "no components")
        assert bool((row - plain).abs().max() > 0.1) == changed, adapter


@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(ratio=3.0, device="cpu"),
        CompressOptions(method="joint", rank=4, device="cpu"),
        CompressOptions(method="cluster", rank=6, clusters=3, device="cpu"),
        CompressOptions(method="ternary", device="cpu"),
        *thorough(
            CompressOptions(ratio=8.0, device="cpu"),
            CompressOptions(max_error=0.1, device="cpu"),
            CompressOptions(method="svd", ratio=3.0, device="cpu"),
            CompressOptions(method="joint", rank=12, device="cpu"),
            CompressOptions(method="joint-diag", rank=12, device="cpu"),
        ),
    ],
    ids=lambda o: f"{o.method} {o.target} {o.rank}",
)
def test_what_every_method_makes_is_served_as_it_reconstructs(options: CompressOptions) -> None:
    base, model = tiny.llama(), tiny.llama()
    members = related(base)
    made = Bundle.from_bytes(compress(members, options).to_bytes())
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=FIRST)
    ids = tiny.tokenizer()("the quick")["input_ids"]
    found = served_logits(model, bank, adapters=[f"{user}@{FIRST}" for user in members], ids=ids)
    for row, user in zip(found, members, strict=True):
        changes = {name: pair.delta() for name, pair in made.reconstruct(user).pairs.items()}
        expected = merged(base, changes)(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3, msg=user)


@pytest.mark.parametrize("family", ["llama", *thorough("gpt2")])
def test_texts_of_all_forms_in_one_batch_are_those_of_peft(family: str) -> None:
    torch.set_num_threads(1)
    base, model = tiny.model(family), tiny.model(family)
    clusters = [place % 2 for place in range(len(USERS))]
    made = handmade.bundle(modules(base), USERS, clusters=clusters, seed=4)
    made = replace(made, fan_in_fan_out=family == "gpt2")
    plain = tiny.lora(base, seed=11, rank=5)
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(Bundle.from_bytes(made.to_bytes()), bundle_id=FIRST)
    bank.activate(FIRST)
    bank.add("a plain adapter", plain)
    references = {user: made.reconstruct(user) for user in USERS} | {"a plain adapter": plain, "": None}
    jobs = list(zip(itertools.cycle(PROMPTS), [*references, *references], strict=False))
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=32, gather_seconds=0.2)) as engine:
        running = [engine.submit(GenerationRequest(prompt, who, max_new_tokens=8)) for prompt, who in jobs]
        found = [generation.result()[1].text for generation in running]
    assert found == [tiny.peft_text(base, prompt, references[who], tokens=8) for prompt, who in jobs]
    assert len(set(found)) > len(USERS)


def test_a_user_without_components_or_norm_is_the_base_model_bit_for_bit() -> None:
    model = tiny.llama()
    made = handmade.bundle(modules(model), {"alice": [["shared"]], "bob": [[]], "carol": [["own"]]})
    made.norm[2] = 0.0
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=FIRST)
    ids = tiny.tokenizer()("the quick")["input_ids"]
    adapters = ["", f"alice@{FIRST}", f"bob@{FIRST}", f"carol@{FIRST}"]
    base, alice, bob, carol = served_logits(model, bank, adapters=adapters, ids=ids)
    assert torch.equal(bob, base) and torch.equal(carol, base) and not torch.allclose(alice, base)
