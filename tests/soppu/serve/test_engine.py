"""The engine against transformers and PEFT: same text for every user, alone or in company."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from soppu.federation.emulator import SUPPORTED
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import GenerationRequest, TokenEvent
from soppu.serve.engine.sampling import Sampling
from tests.soppu.serve import tiny
from tests.thorough import some

PROMPTS = ["def main():", "the quick", "a", "日本語 and a rather longer prompt than the others"]
BUNDLE_ID = "1" * 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def text(engine: Engine, prompt: str, adapter_id: str = "", *, tokens: int = 12) -> str:
    generation = engine.submit(GenerationRequest(prompt, adapter_id, max_new_tokens=tokens))
    return generation.result()[1].text


@pytest.mark.parametrize("family", some(SUPPORTED, "llama", "gpt2"))
def test_users_in_one_batch_get_the_text_of_peft_and_generate(
    family: str, make: Callable[..., Engine]
) -> None:
    model = tiny.model(family)
    members = {name: tiny.lora(model, seed=seed) for seed, name in enumerate(("alice", "bob", "carol"))}
    shared = tiny.bundle(members)
    plain = {"dave": tiny.lora(model, seed=11, rank=5), "erin": tiny.lora(model, seed=12, rank=1)}
    jobs = [
        (who, PROMPTS[index % 4])
        for index, who in enumerate(["alice", "", "bob", "dave", "carol", "erin"] * 2)
    ]
    references = {who: shared.reconstruct(who) for who in members} | plain
    expected = [tiny.peft_text(model, prompt, references.get(who), tokens=12) for who, prompt in jobs]
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(shared, bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    for who, adapter in plain.items():
        bank.add(who, adapter)
    engine = make(model, bank=bank, max_batch=16, gather_seconds=0.2)
    running = [engine.submit(GenerationRequest(prompt, who, max_new_tokens=12)) for who, prompt in jobs]
    found = [generation.result()[1].text for generation in running]
    assert found == expected
    assert len({value for value, (who, _) in zip(found, jobs, strict=True) if who}) > 4


def test_rows_leave_at_their_own_time_and_the_others_go_on_undisturbed(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    lengths = [1, 17, 3, 9]
    expected = [tiny.peft_text(model, p, None, tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    engine = make(model, gather_seconds=0.2)
    running = [
        engine.submit(GenerationRequest(p, max_new_tokens=n)) for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    results = [generation.result() for generation in running]
    assert [finish.text for _, finish in results] == expected
    assert [len(tokens) for tokens, _ in results] == lengths
    assert all(finish.reason == "length" for _, finish in results)


def test_more_requests_than_a_batch_holds_are_all_answered(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    engine = make(model, max_batch=2)
    running = [engine.submit(GenerationRequest(PROMPTS[i % 4], max_new_tokens=3)) for i in range(7)]
    expected = [tiny.peft_text(model, p, None, tokens=3) for p in PROMPTS]
    assert [g.result()[1].text for g in running] == [expected[i % 4] for i in range(7)]


def test_tokens_deltas_and_logprobs_agree_with_the_model(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    engine = make(model)
    tokens, finish = engine.submit(GenerationRequest(PROMPTS[0], max_new_tokens=10)).result()
    ids = tiny.tokenizer()(PROMPTS[0])["input_ids"]
    for token in tokens:
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token.id == int(expected.argmax())
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        ids.append(token.id)
    assert "".join(token.text for token in tokens if not token.special) == finish.text
    assert (finish.generated_tokens, finish.seed) == (10, None)
    assert [token.finish for token in tokens[:-1]] == [None] * 9


def test_the_end_of_text_token_ends_and_may_be_ignored(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    engine = make(model)
    plain, _ = engine.submit(GenerationRequest("a", max_new_tokens=6)).result()
    model.generation_config.eos_token_id = plain[2].id
    first = next(position for position, token in enumerate(plain) if token.id == plain[2].id)
    engine = make(model)
    tokens, finish = engine.submit(GenerationRequest("a", max_new_tokens=6)).result()
    assert (finish.reason, len(tokens)) == ("eos_token", first + 1)
    tokens, finish = engine.submit(GenerationRequest("a", max_new_tokens=6, ignore_eos=True)).result()
    assert (finish.reason, [token.id for token in tokens]) == ("length", [token.id for token in plain])


def test_a_special_token_is_marked_and_no_part_of_the_text(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    eos = tiny.tokenizer().eos_token_id
    with torch.no_grad():
        model.lm_head.weight[eos] += 100 * torch.ones(32)  # the sign of the sum decides
        if float(model(torch.tensor([[7]])).logits[0, -1].argmax()) != eos:
            model.lm_head.weight[eos] *= -1
    prompt = tiny.tokenizer().decode([7])
    tokens, finish = make(model).submit(GenerationRequest(prompt, max_new_tokens=4)).result()
    assert (tokens[-1].id, tokens[-1].special, tokens[-1].text) == (eos, True, "<eos>")
    assert (finish.reason, finish.text) == ("eos_token", "")


def test_a_stop_sequence_ends_the_text_with_itself(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    engine = make(model)
    whole = text(engine, "the quick", tokens=20)
    stop = next(whole[i : i + 3] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 3])
    request = GenerationRequest("the quick", max_new_tokens=20, stop=("never there", stop))
    tokens, finish = engine.submit(request).result()
    assert finish.reason == "stop_sequence"
    assert finish.text == whole[: whole.index(stop) + len(stop)]
    assert "".join(token.text for token in tokens) == finish.text


def test_sampling_is_fixed_by_its_seed_whatever_the_company(make: Callable[..., Engine]) -> None:
    engine = make(tiny.llama(), gather_seconds=0.2)
    hot = Sampling(do_sample=True, temperature=1.5, seed=7)
    request = GenerationRequest("the quick", max_new_tokens=8, sampling=hot)
    alone, finish = engine.submit(request).result()
    company = [engine.submit(GenerationRequest(p, max_new_tokens=5)) for p in PROMPTS]
    together, _ = engine.submit(request).result()
    assert [token.id for token in alone] == [token.id for token in together]
    assert finish.seed == 7
    assert all(g.result() for g in company)
    other = GenerationRequest(
        "the quick", max_new_tokens=8, sampling=Sampling(do_sample=True, temperature=1.5)
    )
    drawn = [engine.submit(other).result() for _ in range(3)]
    assert len({tuple(token.id for token in tokens) for tokens, _ in drawn}) > 1
    assert all(isinstance(finish.seed, int) for _, finish in drawn)


def test_the_repetition_penalty_is_that_of_generate(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    engine = make(model)
    for prompt in PROMPTS:
        request = GenerationRequest(prompt, max_new_tokens=15, sampling=Sampling(repetition_penalty=1.7))
        expected = tiny.peft_text(model, prompt, None, tokens=15, repetition_penalty=1.7)
        assert engine.submit(request).result()[1].text == expected


def test_truncation_keeps_the_end_of_the_prompt(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    request = GenerationRequest("zzzzthe quick"[:], max_new_tokens=5, truncate=3)
    _, finish = make(model).submit(request).result()
    kept = tiny.tokenizer().decode(tiny.tokenizer()("zzzzthe quick")["input_ids"][-3:])
    assert finish.prompt_tokens == 3
    assert finish.text == tiny.peft_text(model, kept, None, tokens=5)


def test_a_request_finishes_on_the_version_it_was_resolved_to(make: Callable[..., Engine]) -> None:
    model = tiny.llama()
    old, new = (tiny.bundle({"alice": tiny.lora(model, seed=seed)}) for seed in (1, 2))
    expected = [tiny.peft_text(model, "a", b.reconstruct("alice"), tokens=9) for b in (old, new)]
    assert expected[0] != expected[1]
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(old, bundle_id="1" * 64)
    bank.activate("1" * 64)
    gate, inside = threading.Event(), threading.Event()
    model.lm_head.register_forward_hook(lambda *_: (inside.set(), gate.wait(30), None)[-1])
    engine = make(model, bank=bank, max_batch=1)
    first = engine.submit(GenerationRequest("a", "alice", max_new_tokens=9))
    assert inside.wait(30)
    waiting = engine.submit(GenerationRequest("a", "alice", max_new_tokens=9))
    bank.stage(new, bundle_id="2" * 64)
    bank.activate("2" * 64)
    bank.drop("1" * 64)
    gate.set()
    assert first.result()[1].text == waiting.result()[1].text == expected[0]
    assert text(engine, "a", "alice", tokens=9) == expected[1]


def test_events_come_one_by_one_before_the_end(make: Callable[..., Engine]) -> None:
    engine = make(tiny.llama())
    seen: list[TokenEvent] = []
    for event in engine.submit(GenerationRequest("a", max_new_tokens=4)):
        seen.append(event)
        assert (event.finish is not None) == (len(seen) == 4)
