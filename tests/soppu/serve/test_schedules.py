"""Whatever the company, whenever rows join or leave: every row gets the tokens of `generate`."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import ConfigError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.decoders import decoder as decoders
from soppu.serve.decoders.decoder import make_decoder
from soppu.serve.decoders.kv_cache import KVCache
from soppu.serve.decoders.llama import LlamaDecoder
from soppu.serve.decoders.transformers_decoder import GeneralDecoder
from soppu.serve.engine.batch import Batch
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import Generation, GenerationRequest, Job, Vocabulary
from tests.soppu.serve import tiny
from tests.thorough import some

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

SMOLLM2 = Path(__file__).parents[3] / ".soppu" / "models" / "smollm2-135m"
OLD, NEW = "1" * 64, "2" * 64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(eq=False)
class House:
    """A model with two bundles and a plain adapter, and what `generate` says for each of them."""

    base: PreTrainedModel
    model: PreTrainedModel
    bank: AdapterBank
    references: dict[str, LoraAdapter | None]
    merged: dict[str, PreTrainedModel] = field(default_factory=dict)

    @classmethod
    def of(cls, family: str) -> House:
        base, model = tiny.model(family), tiny.model(family)
        bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
        references: dict[str, LoraAdapter | None] = {"": None}
        for number, bundle_id in enumerate((OLD, NEW)):
            users = {f"user{n}": tiny.lora(base, seed=10 * number + n) for n in range(4)}
            made = tiny.bundle(users)
            bank.stage(made, bundle_id=bundle_id)
            references |= {f"{user}@{bundle_id}": made.reconstruct(user) for user in users}
        for name, rank in (("plain", 5), ("thin", 1)):
            references[name] = tiny.lora(base, seed=rank, rank=rank)
            bank.add(name, references[name])
        return cls(base, model, bank, references)

    def generation(self, adapter_id: str, prompt: list[int], tokens: int) -> Generation:
        request = GenerationRequest("", adapter_id, ignore_eos=True)
        job = Job(request, self.bank.resolve(adapter_id), tuple(prompt), tokens)
        return Generation(job, Vocabulary(tiny.tokenizer(), frozenset(), frozenset()))

    def expected(self, one: Generation, adapter_id: str) -> list[int]:
        """Greedy tokens, one full forward each over the merged model, without a cache."""
        if adapter_id not in self.merged:
            self.merged[adapter_id] = tiny.merged(self.base, self.references[adapter_id])
        model, ids = self.merged[adapter_id], list(one.job.prompt)
        for _ in range(one.job.limit):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids


def make(house: House, kind: str, cache: KVCache) -> LlamaDecoder | GeneralDecoder:
    if kind == "general":
        return GeneralDecoder(house.model, house.bank.router, cache)
    return LlamaDecoder(house.model, cache)


CASES = [("lean", family) for family in ("llama", "mistral", "qwen2", "qwen3")] + [
    ("general", family) for family in ("llama", "qwen3", "gpt2", "opt", "gpt_neox")
]


@pytest.mark.parametrize(
    ("kind", "family"), some(CASES, ("lean", "llama"), ("lean", "qwen3"), ("general", "gpt2"))
)
def test_any_schedule_gives_every_row_its_own_greedy_tokens(kind: str, family: str) -> None:
    house = House.of(family)
    for seed in range(6):
        chance = random.Random(seed)
        rows = chance.randint(1, 5)
        batch = Batch(
            make(house, kind, KVCache(rows, 128)),
            prefill=chance.choice([3, 16, 64]),
            device=torch.device("cpu"),
        )
        waiting = [
            (who, house.generation(who, prompt, chance.randint(1, 14)))
            for who in chance.choices(list(house.references), k=12)
            if (prompt := [chance.randrange(2, 290) for _ in range(chance.randint(1, 20))])
        ]
        everyone, cancelled = list(waiting), set()
        while waiting or len(batch):
            while waiting and batch.free and chance.random() < 0.4:
                batch.join(waiting.pop()[1])
            if chance.random() < 0.05:
                one = chance.choice(everyone)[1]
                cancelled.add(id(one))
                one.cancel()
            batch.step()
        assert batch.failures == 0
        for who, one in everyone:
            expected = house.expected(one, who)
            if id(one) in cancelled:
                expected = expected[: len(one.ids)]
            assert one.ids == expected, (seed, who)


def test_a_row_that_joins_gets_its_first_token_while_the_others_go_on() -> None:
    house = House.of("llama")
    batch = Batch(make(house, "lean", KVCache(2, 128)), prefill=64, device=torch.device("cpu"))
    first, second = (house.generation("", [5, 6, 7], 40) for _ in range(2))
    batch.join(first)
    for _ in range(4):
        batch.step()
    before = len(first.ids)
    batch.join(second)
    batch.step()
    assert len(first.ids) == before + 1 and len(second.ids) == 3 + 2  # the prompt's token, and one more
    first.cancel()
    batch.step()
    assert len(batch) == 1 and batch.free == 1


def test_a_long_prompt_is_read_in_parts_between_the_tokens_of_the_others() -> None:
    house = House.of("llama")
    batch = Batch(make(house, "lean", KVCache(2, 128)), prefill=10, device=torch.device("cpu"))
    short, long = house.generation("", [5], 60), house.generation("plain", list(range(2, 57)), 3)
    batch.join(short)
    batch.step()
    batch.join(long)
    for part in range(5):
        before = len(short.ids)
        batch.step()
        assert len(short.ids) == before + 1 and len(long.ids) == 55, part
    while not long.done:
        batch.step()
    assert long.ids == house.expected(long, "plain")


def test_a_slot_left_by_a_row_with_numbers_that_are_not_finite_is_clean_for_the_next() -> None:
    house = House.of("llama")
    house.bank.add("bad", tiny.lora(house.base, seed=3))
    slot = house.bank.resolve("bad").where
    for pair in slot.pairs.values():  # type: ignore[union-attr]
        pair.B.fill_(float("nan"))
    batch = Batch(make(house, "lean", KVCache(2, 128)), prefill=64, device=torch.device("cpu"))
    bad, good = house.generation("bad", list(range(9, 29)), 5), house.generation("", [5, 6], 12)
    batch.join(bad)
    batch.step()
    assert bad.done and not len(batch)
    long = house.generation(
        "plain", list(range(9, 29)), 12
    )  # beside it, so that more than its own is looked at
    batch.join(good)
    batch.step()
    batch.join(long)
    while len(batch):
        batch.step()
    assert good.ids == house.expected(good, "") and long.ids == house.expected(long, "plain")


def test_the_cache_is_not_copied_when_rows_come_and_go() -> None:
    house = House.of("llama")
    lean = make(house, "lean", KVCache(3, 128))
    batch = Batch(lean, prefill=64, device=torch.device("cpu"))
    batch.join(house.generation("", [5], 2))
    batch.step()
    [place] = lean.cache.pages.blocks.stores()
    for _ in range(5):
        while batch.free:
            batch.join(house.generation("plain", [7, 8], 3))
        batch.step()
    [after] = lean.cache.pages.blocks.stores()
    assert after.data_ptr() == place.data_ptr()


def test_each_family_gets_the_decoder_that_can_run_it() -> None:
    cache = KVCache(2, 64)
    kinds = {
        family: type(make_decoder(tiny.model(family), None, cache)) for family in ("llama", "qwen3", "gpt2")
    }  # type: ignore[arg-type]
    assert kinds == {"llama": LlamaDecoder, "qwen3": LlamaDecoder, "gpt2": GeneralDecoder}
    narrow = tiny.model("mistral")
    narrow.config.sliding_window = 16
    assert isinstance(make_decoder(narrow, None, cache), GeneralDecoder)  # type: ignore[arg-type]
    assert "below the 64 tokens" in decoders.obstacle(narrow, limit=64)


def test_a_sliding_window_is_that_of_transformers() -> None:
    base, model = tiny.model("mistral"), tiny.model("mistral")
    for one in (base, model):
        one.config.sliding_window = 6
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=4)) as engine:
        prompts = ["def main():", "the quick brown fox"]
        running = [engine.submit(GenerationRequest(prompt, max_new_tokens=12)) for prompt in prompts]
        found = [one.result()[1].text for one in running]
    assert found == [tiny.peft_text(base, prompt, None, tokens=12) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("max_batch", 0, 1),
        ("prefill_tokens", 0, 1),
        ("max_input_tokens", -1, 0),
        ("max_total_tokens", -1, 0),
        ("max_total_tokens", 1, 2),
    ],
)
def test_options_that_could_never_answer_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}: {value}, allowed: {least} and more"):
        EngineOptions(**{name: value})


def test_a_request_that_comes_while_others_run_does_not_wait_for_them() -> None:
    model = tiny.llama()
    with Engine(model, tiny.tokenizer(), AdapterBank(model, base_hash=tiny.BASE_HASH)) as engine:
        begun = threading.Event()
        long = engine.submit(
            GenerationRequest("a", max_new_tokens=120, ignore_eos=True), sink=lambda _: begun.set()
        )
        assert begun.wait(30)
        engine.submit(GenerationRequest("the quick", max_new_tokens=2)).result()
        assert not long.done
        long.cancel()


@pytest.mark.long
@pytest.mark.skipif(not SMOLLM2.exists(), reason="the base model has not been converted on this machine")
def test_smollm2_in_a_busy_batch_says_what_generate_says() -> None:
    from soppu.models import load_model, resolve

    model = load_model(resolve(str(SMOLLM2), cache=SMOLLM2.parent))
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    g = torch.Generator().manual_seed(0)
    shapes = {
        f"model.layers.{n}.self_attn.{p}": o for n in range(30) for p, o in (("q_proj", 576), ("v_proj", 192))
    }
    users: dict[str, LoraAdapter | None] = {"": None}
    for user in ("alice", "bob", "carol"):
        pairs = {
            name: LoraPair(0.04 * torch.randn(4, 576, generator=g), 0.1 * torch.randn(o, 4, generator=g))
            for name, o in shapes.items()
        }
        users[user] = LoraAdapter(pairs, base_model="smollm2", base_hash=tiny.BASE_HASH)
    prompts = ["def fibonacci(n):", "Once upon a time, in a land far away,"]
    jobs = [(user, prompt) for prompt in prompts for user in users]
    answers = {}
    for user, adapter in users.items():
        merged = tiny.merged(model, adapter)  # one at a time: half a gigabyte each
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")
            out = merged.generate(**ids, do_sample=False, max_new_tokens=12)
            answers[user, prompt] = out[0, ids["input_ids"].shape[1] :].tolist()
    expected = [answers[job] for job in jobs]
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    made = tiny.bundle({user: adapter for user, adapter in users.items() if adapter}, rank=12)
    bank.stage(made, bundle_id=OLD)
    bank.activate(OLD)
    with Engine(model, tokenizer, bank, EngineOptions(max_batch=5)) as engine:
        running = [engine.submit(GenerationRequest(prompt, user, max_new_tokens=12)) for user, prompt in jobs]
        found = [[token.id for token in one.result()[0]] for one in running]
    assert found == expected
