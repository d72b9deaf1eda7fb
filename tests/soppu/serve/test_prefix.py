"""What several requests' prompts have in common is read once, as far as it is the same for their users."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.decoders.blocks import BLOCK
from soppu.serve.decoders.kv_cache import KVCache
from soppu.serve.decoders.llama import LlamaDecoder
from soppu.serve.decoders.row_pages import BASE, Part
from soppu.serve.decoders.sharing import Sharing, lowest_layer
from soppu.serve.engine.batch import Batch
from soppu.serve.engine.generation import Generation, GenerationRequest, Job, Vocabulary
from soppu.serve.layers.factors import PairSlot
from tests.conftest import build_model
from tests.soppu.serve import tiny
from tests.thorough import some

OLD, NEW = "1" * 64, "2" * 64
TOP, MIDDLE = 6, 3  # the lowest layers that adapters here change
LIMIT = 160


def upper(adapter: LoraAdapter, lowest: int) -> LoraAdapter:
    """The adapter without what it changes below a layer."""
    return replace(adapter, pairs={n: p for n, p in adapter.pairs.items() if int(n.split(".")[2]) >= lowest})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@dataclass(eq=False)
class House:
    """A model of eight layers; adapters that begin at its sixth, its third and its first layer."""

    base: PreTrainedModel
    model: PreTrainedModel
    bank: AdapterBank
    references: dict[str, LoraAdapter | None]
    told: dict[tuple[str, tuple[int, ...]], list[int]]

    @classmethod
    def build(cls) -> House:
        base, model = build_model("llama"), build_model("llama")
        house = cls(base, model, AdapterBank(model, base_hash=tiny.BASE_HASH), {"": None}, {})
        for number, bundle_id in enumerate((OLD, NEW)):
            users = {f"user{n}": house.adapter(10 * number + n, TOP) for n in range(3)}
            made = tiny.bundle(users)
            house.bank.stage(made, bundle_id=bundle_id)
            house.references |= {f"{user}@{bundle_id}": made.reconstruct(user) for user in users}
        for name, lowest in (("top", TOP), ("middle", MIDDLE), ("whole", 0)):
            house.add(name, house.adapter(len(name), lowest))
        return house

    def adapter(self, seed: int, lowest: int) -> LoraAdapter:
        return upper(tiny.lora(self.base, seed=seed), lowest)

    def add(self, name: str, adapter: LoraAdapter) -> None:
        self.references[name] = adapter
        self.bank.add(name, adapter)

    def batch(self, rows: int = 4, *, prefix: int = 1024, tokens: int = 0, prefill: int = 64) -> Batch:
        cache = KVCache(rows, LIMIT, tokens=tokens, prefix=prefix)
        return Batch(LlamaDecoder(self.model, cache), prefill=prefill, device=torch.device("cpu"))

    def generation(self, adapter_id: str, prompt: list[int], tokens: int = 4, **asked: bool) -> Generation:
        request = GenerationRequest("", adapter_id, ignore_eos=True, **asked)
        texts = ("?",) * len(prompt) if asked else ()
        job = Job(request, self.bank.resolve(adapter_id), tuple(prompt), tokens, texts)
        return Generation(job, Vocabulary(tiny.tokenizer(), frozenset(), frozenset()))

    def expected(self, adapter_id: str, prompt: list[int], tokens: int) -> list[int]:
        """Greedy tokens of the merged model, without a cache."""
        key = adapter_id, tuple(prompt)
        ids = self.told.setdefault(key, list(prompt))
        if len(ids) < len(prompt) + tokens:
            model = tiny.merged(self.base, self.references[adapter_id])
            while len(ids) < len(prompt) + tokens:
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[: len(prompt) + tokens]


@pytest.fixture(scope="module")
def house() -> House:
    torch.set_num_threads(1)
    return House.build()


def cache_of(batch: Batch) -> KVCache:
    return batch._decoder.cache


def run(batch: Batch, *generations: Generation) -> None:
    for generation in generations:
        assert batch.takes(generation)
        batch.join(generation)
    while len(batch):
        batch.step()
    assert batch.failures == 0


def prompt_of(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(2, 290) for _ in range(length)]


def assert_whole(cache: KVCache) -> None:
    """Every block is free, used, or kept; what is promised is there; nobody waits for what nobody has."""
    pages = cache.pages
    assert pages.blocks.free + pages.used + pages.idle == pages.blocks.count
    assert pages.used + pages.promised <= pages.blocks.count
    assert pages.idle <= cache.prefix // BLOCK * cache.sizes.layers


COMMON = prompt_of(0, 5 * BLOCK)


@pytest.mark.parametrize(
    ("first", "second", "shared", "own"),
    [
        ("", f"user0@{OLD}", 80, 0),
        (f"user0@{OLD}", f"user1@{OLD}", 80, 0),
        (f"user0@{OLD}", f"user0@{OLD}", 80, 80),
        (f"user0@{OLD}", f"user0@{NEW}", 80, 0),  # another version has the layers below in common only
        (f"user0@{OLD}", "top", 80, 0),
        ("", "", 80, 0),
        ("whole", "whole", 0, 80),
        ("whole", "", 0, 0),
    ],
)
def test_what_the_second_request_finds_is_what_its_user_does_not_change(
    house: House, first: str, second: str, shared: int, own: int
) -> None:
    batch = house.batch()
    run(batch, house.generation(f"user2@{OLD}", prompt_of(1, 20)))  # so that it is known where users begin
    run(batch, house.generation(first, [*COMMON, 7, 8]))
    cache = cache_of(batch)
    before = dict(cache.reused)
    later = house.generation(second, [*COMMON, 9])
    run(batch, later)
    assert {kind: cache.reused[kind] - before[kind] for kind in before} == {"shared": shared, "own": own}
    assert later.ids == house.expected(second, [*COMMON, 9], 4)
    assert_whole(cache)


def test_less_is_read_where_more_is_shared(house: House) -> None:
    """Of a forward's layers, by tokens: the prompt in the user's layers, and the rest in all."""
    batch, ran = house.batch(), []
    forward = batch._decoder.forward

    def counted(step, routing):  # type: ignore[no-untyped-def]
        ran.append((step.first, sum(step.counts)))
        return forward(step, routing)

    batch._decoder.forward = counted  # type: ignore[method-assign]
    run(batch, house.generation(f"user0@{OLD}", [*COMMON, 7, 8], 1))
    assert ran == [(0, 64), (0, 18)]
    ran.clear()
    run(batch, house.generation(f"user1@{OLD}", [*COMMON, 9, 10], 1))
    assert ran == [(TOP, 80), (0, 2)]
    ran.clear()
    run(batch, house.generation(f"user1@{OLD}", [*COMMON, 11], 1))
    assert ran == [(0, 1)]


def test_rows_that_come_together_read_what_they_share_once(house: House) -> None:
    batch = house.batch(4, prefill=256)
    users = [f"user0@{OLD}", f"user1@{OLD}", f"user1@{OLD}", ""]
    together = [house.generation(user, [*COMMON, 20 + n]) for n, user in enumerate(users)]
    run(batch, *together)
    assert cache_of(batch).reused == {"shared": 3 * 80, "own": 80}
    for user, one in zip(users, together, strict=True):
        assert one.ids == house.expected(user, list(one.job.prompt), 4)


def test_a_request_that_is_told_of_its_prompt_reads_all_of_it(house: House) -> None:
    batch = house.batch()
    run(batch, house.generation("top", COMMON))
    asked = house.generation("top", COMMON, prefill_details=True)
    run(batch, asked)
    assert cache_of(batch).asked["own"] == 80 and cache_of(batch).reused["own"] == 0
    assert len(asked.read) == len(COMMON) and None not in asked.read[1:]


def test_an_adapter_of_the_same_name_finds_nothing_of_the_one_before(house: House) -> None:
    batch = house.batch()
    prompt = [*COMMON, 5]
    for seed in (70, 71, 70):
        house.add("changing", house.adapter(seed, TOP))
        house.told.pop(("changing", tuple(prompt)), None)
        one = house.generation("changing", prompt)
        run(batch, one)
        assert one.ids == house.expected("changing", prompt, 4)
    assert cache_of(batch).reused == {"shared": 160, "own": 0}


def test_no_prompt_is_shared_where_that_is_switched_off(house: House) -> None:
    batch = house.batch(prefix=0)
    for user in ("", "", "top", "top"):
        one = house.generation(user, [*COMMON, 3])
        run(batch, one)
        assert one.ids == house.expected(user, [*COMMON, 3], 4)
    cache = cache_of(batch)
    assert cache.reused == cache.asked == {"shared": 0, "own": 0}
    assert cache.pages.idle == cache.pages.used == 0


def test_what_is_kept_for_others_never_takes_room_that_a_row_was_promised(house: House) -> None:
    """One row may need all there is: states of its prompt have no room, nor have pages that others left."""
    batch = house.batch(2, tokens=LIMIT, prefix=LIMIT)
    cache = cache_of(batch)
    run(batch, house.generation(f"user0@{OLD}", COMMON, 2))
    assert cache.pages.idle
    for who in (f"user1@{OLD}", f"user1@{OLD}", "middle"):
        prompt = [*COMMON, *prompt_of(3, 70)]
        one = house.generation(who, prompt, LIMIT - 150)
        assert batch.takes(one)
        batch.join(one)
        assert not batch.takes(house.generation("", [5], 1))
        while len(batch):
            batch.step()
            assert_whole(cache)
        assert one.ids == house.expected(who, prompt, LIMIT - 150)
    assert batch.failures == 0


def test_a_request_that_is_cancelled_at_any_moment_gives_its_blocks_back(house: House) -> None:
    """Another thread cancels: at each time in turn that the batch looks whether a row is done."""
    for moment in range(12):
        batch, looks = house.batch(prefix=32), iter([False] * moment)
        one, other = house.generation("top", [*COMMON, 3], 3), house.generation("", COMMON, 3)

        done = property(lambda _, looks=looks: next(looks, True), lambda _, value: None)
        one.__class__ = type("Watched", (Generation,), {"done": done})
        batch.join(one)
        batch.join(other)
        for _ in range(12):
            batch.step()
        assert not len(batch) and other.ids == house.expected("", COMMON, 3)
        assert_whole(cache_of(batch))
        assert cache_of(batch).pages.used == cache_of(batch).pages.promised == 0, moment


@pytest.mark.parametrize(
    ("names", "lowest"),
    [
        (["model.layers.6.self_attn.q_proj", "model.layers.7.mlp.down_proj"], 6),
        (["model.layers.10.mlp.up_proj"], 10),
        (["lm_head"], 30),
        ([], 30),
        (["model.layers.6.self_attn.q_proj", "model.embed_tokens"], 0),
        (["transformer.h.6.attn.c_attn"], 0),
    ],
)
def test_the_lowest_layer_of_an_adapter(names: list[str], lowest: int) -> None:
    assert lowest_layer(names, layers=30) == lowest


def test_layers_are_cut_at_few_places() -> None:
    sharing = Sharing(30)
    slots = [PairSlot({f"model.layers.{n}.mlp.down_proj": None}) for n in (26, 20, 26, 10, 5, 0)]  # type: ignore[dict-item]
    assert sharing.parts(None) == (Part(0, 30),)
    first = sharing.parts(slots[0])
    assert [(part.first, part.end) for part in first] == [(0, 26), (26, 30)]
    for slot in slots[1:]:
        parts = sharing.parts(slot)
        assert parts[0].first == 0 and parts[-1].end == 30 and len(parts) <= 4
    # the fourth to begin somewhere of its own shares what ends below that; here nothing does
    fifth, whole = sharing.parts(slots[4]), sharing.parts(slots[5])
    assert BASE not in {part.whose for part in (*fifth, *whole)}
    assert [(p.end, p.whose == BASE) for p in sharing.parts(slots[1])] == [
        (10, True),
        (20, True),
        (26, False),
        (30, False),
    ]
    assert {part.whose for part in sharing.parts(None)} == {BASE}
    assert sharing.parts(slots[0])[-1].whose != sharing.parts(slots[2])[-1].whose


@pytest.mark.parametrize("seed", some(range(6), 0, 1))
def test_any_company_gets_its_own_texts_and_every_block_comes_back(house: House, seed: int) -> None:
    """Requests of all kinds that begin alike, come and go, in room for a few; adapters are replaced."""
    chance = random.Random(seed)
    rows = chance.randint(2, 5)
    batch = house.batch(
        rows,
        prefix=chance.choice([0, 32, 96, 512]),
        tokens=chance.choice([LIMIT, 2 * LIMIT, 0]),
        prefill=chance.choice([5, 16, 48, 256]),
    )
    cache, begins = cache_of(batch), [prompt_of(n, 48) for n in range(2)]
    names = [name for name in house.references if name != "changing"]
    waiting, everyone, cancelled = [], [], set()
    for _ in range(16):
        begin = chance.choice(begins)[: chance.choice([0, 20, 32, 48])]
        prompt = begin + [chance.randrange(2, 290) for _ in range(chance.randint(1, 3))]
        waiting.append((chance.choice(names), prompt, chance.randint(1, 5)))
    while waiting or len(batch):
        if waiting and chance.random() < 0.5:
            who, prompt, tokens = waiting[-1]
            one = house.generation(who, prompt, tokens)
            if batch.takes(one):
                waiting.pop()
                everyone.append((who, one))
                batch.join(one)
        if everyone and chance.random() < 0.06:
            one = chance.choice(everyone)[1]
            cancelled.add(id(one))
            one.cancel()
        batch.step()
        assert_whole(cache)
    assert batch.failures == 0 and len(everyone) == 16
    for who, one in everyone:
        expected = house.expected(who, list(one.job.prompt), one.job.limit)
        assert one.ids == (expected[: len(one.ids)] if id(one) in cancelled else expected), who
    assert cache.pages.used == cache.pages.promised == 0
    assert not cache.tables.any()
