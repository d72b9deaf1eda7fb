"""Prompts within limits: refused by their characters only where too long, and nobody waits for them."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from soppu.errors import ConfigError, RequestError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.prompt import Prompts, token_bound
from tests.soppu.serve import tiny


def byte_level(change: Callable[[Tokenizer], None] = lambda _: None) -> PreTrainedTokenizerFast:
    backend = copy.deepcopy(tiny.tokenizer().backend_tokenizer)
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def nfc(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()


def qwen(backend: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|\s+"), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.add_special_tokens(["<|im_start|>"])


def sentencepiece(*, fallback: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "\u2581": 1, "a": 2, "aa": 3, "aaaa": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    model = models.BPE(
        vocab=vocabulary,
        merges=[("a", "a"), ("aa", "aa")],
        byte_fallback=fallback,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def without(*lost: str) -> PreTrainedTokenizerFast:
    """Byte level, but for tokens that hold one of these; as SmolLM2's lacks some control characters."""
    settings = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    model = settings["model"]
    tokens = [token for token in model["vocab"] if not set(lost) & set(token)]
    model["vocab"] = {token: number for number, token in enumerate(tokens)}
    model["merges"] = [pair for pair in model["merges"] if not set(lost) & set("".join(pair))]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))


PROVEN = {
    "byte level": byte_level(),
    "characters are dropped, but it is known which": without("a", "e"),
    "NFC": byte_level(nfc),
    "split": byte_level(qwen),
    "sentencepiece": sentencepiece(),
}


def few_letters(backend: Tokenizer) -> None:
    trainer = trainers.BpeTrainer(vocab_size=50, show_progress=False)
    backend.train_from_iterator(["a b c"], trainer)


UNPROVEN = {
    "unknown characters are fused": sentencepiece(fallback=False),
    "bytes without a token are dropped": byte_level(few_letters),
    "an added token takes the spaces around it": byte_level(
        lambda backend: backend.add_tokens([AddedToken("<x>", rstrip=True)])
    ),
    "a word is one token, however long": words(),
    "spaces are stripped": byte_level(lambda b: setattr(b, "normalizer", normalizers.Strip())),
    "a long text is replaced by a short one": byte_level(
        lambda b: setattr(b, "normalizer", normalizers.Replace("aaa", "a"))
    ),
    "a pattern is replaced": byte_level(
        lambda b: setattr(b, "normalizer", normalizers.Replace(Regex("a+"), "a"))
    ),
    "what is split at is removed": byte_level(
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Split(" ", behavior="removed"))
    ),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_no_limit_of_characters_is_claimed_where(name: str) -> None:
    assert token_bound(UNPROVEN[name]).reach == 0


texts = st.text(st.sampled_from("a \u2581e\u0301\u0323語🦊<") | st.characters(codec="utf-8"), max_size=60)


@pytest.mark.parametrize("name", PROVEN)
@settings(max_examples=60)
@given(text=texts | st.sampled_from(["a", " ", "the quick", "<|im_start|>", "e\u0301"]).map(lambda s: s * 40))
def test_no_token_stands_for_more_characters_than_is_claimed(name: str, text: str) -> None:
    bound = token_bound(PROVEN[name])
    assert 0 < bound.reach < 100
    assert bound.fewest(text) <= len(PROVEN[name](text)["input_ids"])
    assert bound.fewest("語" * 1000) > 5


@pytest.mark.parametrize("name", [*PROVEN, *UNPROVEN])
@settings(max_examples=30)
@given(text=texts, limit=st.integers(1, 40), spare=st.integers(1, 20), new=st.none() | st.integers(1, 30))
def test_what_is_refused_by_its_characters_would_have_been_refused_anyway(
    name: str, text: str, limit: int, spare: int, new: int | None
) -> None:
    tokenizer = (PROVEN | UNPROVEN)[name]
    request = GenerationRequest(text, max_new_tokens=new)

    def verdict(long: int) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("soppu.serve.engine.prompt._LONG", long)
            try:
                ids, _ = Prompts(tokenizer, max_input=limit, max_total=limit + spare).read(request)
            except RequestError as error:
                return f"{error.status}"
            return str(ids)

    assert verdict(long=0) == verdict(long=10**9)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths of the texts that are tokenized."""
    seen: list[int] = []
    original = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: str, **options: Any) -> Any:
        seen.append(len(text))
        return original(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    yield seen


def test_characters_that_leave_no_token_prove_nothing() -> None:
    bound = token_bound(without("a", "e"))
    assert bound.lost == "ae" and bound.fewest("ae" * 1000) == 0
    assert bound.fewest("ae" * 1000 + "b") == 1 <= len(without("a", "e")("ab")["input_ids"])


def test_a_huge_prompt_is_refused_untokenized_with_the_least_it_must_be(counted: list[int]) -> None:
    prompts = Prompts(tiny.tokenizer(), max_input=20, max_total=30)
    counted.clear()
    least = -(-2_000_000 // token_bound(tiny.tokenizer()).reach)
    with pytest.raises(RequestError, match=f"less than 20 tokens. Given: at least {least}$") as caught:
        prompts.read(GenerationRequest("a" * 2_000_000))
    assert caught.value.status == 422
    with pytest.raises(RequestError, match=f"<= 30. Given: at least {least} `inputs` tokens and 5 `max"):
        prompts.read(GenerationRequest("語" * 2_000_000, max_new_tokens=5))
    assert counted == []
    with pytest.raises(RequestError, match="Given: 200$"):  # a short one is counted exactly
        prompts.read(GenerationRequest("a" * 200))
    assert len(prompts.read(GenerationRequest("a" * 20_000, truncate=7))[0]) == 7
    assert counted == [200, 20_000]


def test_nobody_waits_for_long_prompts_and_only_so_many_of_them_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(tiny.tokenizer(), max_input=20, max_total=30)
    original, gate, inside = PreTrainedTokenizerFast.__call__, threading.Event(), threading.Event()
    together: list[int] = []

    def held(self: Any, text: str, **options: Any) -> Any:
        if len(text) > 1000:
            together.append(1)
            inside.set()
            assert gate.wait(30)
            assert len(together) == 1
            together.pop()
        return original(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", held)
    long = GenerationRequest("a" * 20_000, truncate=7)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(prompts.read(long)[0]))) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert inside.wait(30)
    while prompts._places._value:  # until all of them have a place
        pass
    assert list(prompts.read(GenerationRequest("fox"))[0]) == tiny.tokenizer()("fox")["input_ids"]
    with pytest.raises(RequestError, match="overloaded") as caught:
        prompts.read(long)
    assert caught.value.status == 429
    gate.set()
    for thread in threads:
        thread.join(30)
    assert found == [7] * 16
    assert len(prompts.read(long)[0]) == 7


def test_many_threads_tokenize_at_once_and_each_gets_its_own_ids() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)  # as a tokenizer's file may ask for
    tokenizer.backend_tokenizer.enable_padding(length=50)
    prompts = Prompts(tokenizer, max_input=100, max_total=120)
    wrong: list[str] = []

    def read(text: str) -> None:
        for _ in range(50):
            if list(prompts.read(GenerationRequest(text))[0]) != tiny.tokenizer()(text)["input_ids"]:
                wrong.append(text)

    threads = [threading.Thread(target=read, args=(f"the quick {number}" * 3,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_special_tokens_are_added_unless_the_prompt_names_its_own() -> None:
    template = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer = byte_level(lambda backend: setattr(backend, "post_processor", template))
    prompts = Prompts(tokenizer, max_input=20, max_total=30)
    plain = tuple(tiny.tokenizer()("fox")["input_ids"])
    assert prompts.read(GenerationRequest("fox"))[0] == (0, *plain)
    assert prompts.read(GenerationRequest("<eos>fox", add_special_tokens=False))[0] == (0, *plain)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, (127, 128)),
        ({"max_input_tokens": 0, "max_total_tokens": 0}, (127, 128)),
        ({"max_input_tokens": 20, "max_total_tokens": 0}, (20, 128)),
        ({"max_input_tokens": 0, "max_total_tokens": 50}, (49, 50)),
        ({"max_input_tokens": 200, "max_total_tokens": 50}, (49, 50)),
    ],
)
def test_limits_are_those_asked_for_within_what_the_model_can(
    options: dict[str, int], limits: tuple[int, int]
) -> None:
    model = tiny.llama()
    engine = Engine(
        model, tiny.tokenizer(), AdapterBank(model, base_hash=tiny.BASE_HASH), EngineOptions(**options)
    )
    assert (engine.max_input_tokens, engine.max_total_tokens) == limits


def test_a_model_that_names_no_limit_needs_one() -> None:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    model.config.max_position_embeddings = 0
    with pytest.raises(ConfigError, match="max_total_tokens: 0, but this model's configuration names no"):
        Engine(model, tiny.tokenizer(), bank, EngineOptions(max_total_tokens=0))
    assert Engine(model, tiny.tokenizer(), bank, EngineOptions(max_total_tokens=60)).max_input_tokens == 59
