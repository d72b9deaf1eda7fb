"""What is told beside the text: alternatives, the prompt's tokens, the texts that were not the best."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from soppu.adapter import LoraAdapter
from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.sampling import Sampling
from tests.soppu.serve import tiny

PROMPT = "the quick brown fox jumps"
HOT = Sampling(do_sample=True, temperature=2.0)


@dataclass
class House:
    engine: Engine
    base: PreTrainedModel  # as it is without an engine
    adapter: LoraAdapter  # alice's

    def logprobs(self, ids: list[int], who: str) -> Tensor:
        """(len(ids), v): how likely each token is after each of these."""
        model = tiny.merged(self.base, self.adapter if who else None)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """One for each decoder."""
    torch.set_num_threads(1)
    base, model = tiny.model(request.param), tiny.model(request.param)
    bank, adapter = AdapterBank(model, base_hash=tiny.BASE_HASH), tiny.lora(base, seed=1)
    bank.add("alice", adapter)
    options = EngineOptions(max_batch=8, max_queue=8, max_best_of=3, prefill_tokens=5, gather_seconds=0.2)
    with Engine(model, tiny.tokenizer(), bank, options) as engine:
        yield House(engine, base, adapter)


def test_the_likeliest_tokens_are_those_of_the_model(house: House) -> None:
    ids = tiny.tokenizer()(PROMPT)["input_ids"]
    request = GenerationRequest(PROMPT, "alice", max_new_tokens=6, alternatives=4, sampling=HOT)
    tokens, _ = house.engine.submit(request).result()
    for token in tokens:
        expected = house.logprobs(ids, "alice")[-1].topk(4)
        assert [other.id for other in token.alternatives] == expected.indices.tolist()
        found = [other.logprob for other in token.alternatives]
        assert found == pytest.approx(expected.values.tolist(), abs=1e-3)
        for other in token.alternatives:
            if other.id == token.id:
                assert other.logprob == token.logprob
                # the last token's text also holds the bytes of a character that never came to its end
                assert other.text == token.text or token is tokens[-1]
        ids.append(token.id)


def test_a_prompts_tokens_are_told_of_with_how_likely_they_were_in_their_place(house: House) -> None:
    jobs = [("alice", PROMPT), ("", "a"), ("", PROMPT), ("alice", "日本語 and more than five tokens")]
    requests = [GenerationRequest(p, who, max_new_tokens=3, prefill_details=True) for who, p in jobs]
    plain = [replace(request, prefill_details=False) for request in requests]
    running = [house.engine.submit(request) for request in [*requests, *plain]]
    results = [generation.result() for generation in running]
    for (who, prompt), (tokens, finish), (same, silent) in zip(jobs, results, results[4:], strict=False):
        ids = tiny.tokenizer()(prompt)["input_ids"]
        told = house.logprobs(ids, who)[range(len(ids) - 1), ids[1:]].tolist()
        assert [token.id for token in finish.prefill] == ids
        assert finish.prefill[0].logprob is None
        assert [token.logprob for token in finish.prefill[1:]] == pytest.approx(told, abs=1e-3)
        assert [token.text for token in finish.prefill] == [tiny.tokenizer().decode([i]) for i in ids]
        assert [token.id for token in tokens] == [token.id for token in same]
        assert silent.prefill == ()


def test_the_best_of_several_texts_has_the_highest_mean_logprob(house: House) -> None:
    request = GenerationRequest(PROMPT, "alice", max_new_tokens=5, best_of=3, sampling=HOT)
    tokens, finish = house.engine.submit(request).result()
    texts = [list(tokens), *map(list, finish.others)]
    assert len(texts) == 3 and all(text[-1].finish for text in texts)
    assert len({text[-1].finish.seed for text in texts if text[-1].finish}) == 3
    assert len({tuple(token.id for token in text) for text in texts}) > 1
    means = [fmean(token.logprob for token in text) for text in texts]
    assert means[0] == max(means)
    # a special token may end a text inside a character: the whole tells of it, no token's own text
    assert finish.text == tiny.tokenizer().decode([token.id for token in tokens], skip_special_tokens=True)
    again = GenerationRequest(
        PROMPT, "alice", max_new_tokens=5, sampling=replace(HOT, seed=finish.seed)
    )  # each is the text its seed gives
    assert house.engine.submit(again).result()[1].text == finish.text


def test_best_of_is_held_to_its_limit_and_to_the_room_in_the_queue(house: House) -> None:
    with pytest.raises(RequestError, match="`best_of` must be > 0 and <= 3. Given: 4") as caught:
        house.engine.submit(GenerationRequest("a", best_of=4, sampling=HOT))
    assert caught.value.status == 422
    options = EngineOptions(max_queue=2, max_best_of=3)
    small = Engine(tiny.llama(), tiny.tokenizer(), house.engine.bank, options)  # nothing leaves its queue
    with pytest.raises(RequestError, match="overloaded"):
        small.submit(GenerationRequest("a", best_of=3, sampling=HOT))
    assert small.waiting == 0
    small.submit(GenerationRequest("a", best_of=2, sampling=HOT))
    assert small.waiting == 2
    small.close()


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
def test_all_texts_of_a_request_end_when_it(end: str) -> None:
    model = tiny.llama()
    gate, inside = threading.Event(), threading.Event()
    handle = model.lm_head.register_forward_hook(lambda *_: (inside.set(), gate.wait(30), None)[-1])
    with Engine(model, tiny.tokenizer(), AdapterBank(model, base_hash=tiny.BASE_HASH)) as engine:
        told: list[object] = []
        best = GenerationRequest("a", max_new_tokens=100, ignore_eos=True, best_of=2, sampling=HOT)
        generation = engine.submit(best, sink=told.append)
        assert inside.wait(30)
        handle.remove()
        if end == "fails":
            broken = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
            gate.set()
            while not generation.done:
                pass
            broken.remove()
        else:
            generation.cancel()
            gate.set()
        assert engine.submit(GenerationRequest("a", max_new_tokens=2)).result()
        assert engine.running <= 1 and engine.waiting == 0
    errors = [str(event) for event in told]
    assert [("ZeroDivisionError" in error) for error in errors] == ([True] if end == "fails" else [])
