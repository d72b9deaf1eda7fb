"""Where a text ends: stop sequences are looked for in the text with its special tokens, as LoRAX does."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from soppu.serve.bank.bank import Resolved
from soppu.serve.engine.generation import (
    Choice,
    Finish,
    Generation,
    GenerationRequest,
    Job,
    TokenEvent,
    Vocabulary,
)
from soppu.serve.engine.text import Detokenizer
from tests.soppu.serve import tiny

TOKENIZER = copy.deepcopy(tiny.tokenizer())
TOKENIZER.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<think>", special=False)])
EOS, IM_END, THINK = TOKENIZER.convert_tokens_to_ids(["<eos>", "<|im_end|>", "<think>"])
VOCABULARY = Vocabulary(TOKENIZER, eos=frozenset([EOS]), special=frozenset([EOS, IM_END]))
ASCII = [i for i in range(2, len(TOKENIZER)) if TOKENIZER.decode([i]).isascii()]


def generate(ids: Sequence[int], *stop: str, **request: bool) -> tuple[list[TokenEvent], Finish | None]:
    """What a request that is given these tokens tells, until it ends."""
    asked = GenerationRequest("x", stop=stop, **request)
    told: list[TokenEvent] = []
    generation = Generation(
        Job(asked, Resolved("", "", None), (5,), len(ids)),
        VOCABULARY,
        sink=told.append,  # type: ignore[arg-type]
    )
    for token_id in ids:
        generation.push(Choice(token_id, -1.0))
        if generation.done:
            break
    return told, told[-1].finish


def ids_of(text: str) -> list[int]:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    return ids


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("the fox<|im_end|>over", "<|im_end|>", "the fox"),
        ("the fox<|im_end|>\nthe dog", "<|im_end|>\nth", "the fox\nth"),
        ("the fox<|im_end|>over", "ox<|im_", "the fox"),
        ("the fox<|im_end|><|im_end|>over", "<|im_end|><|im_end|>", "the fox"),
        ("the fox<think>over", "<think>", "the fox<think>"),
        ("the fox<think>over", "x<think>ov", "the fox<think>ov"),
        ("the <|im_end|>fox", "the fox", "the fox"),  # not in the text with the special token: no stop
        ("日本<|im_end|>語", "本<|im_end|>", "日本"),
    ],
)
def test_a_stop_sequence_may_name_special_and_added_tokens(text: str, stop: str, shown: str) -> None:
    told, finish = generate(ids_of(text), "never there", stop)
    assert finish is not None and finish.text == shown
    assert finish.reason == ("length" if stop == "the fox" else "stop_sequence")
    assert "".join(token.text for token in told if not token.special) == shown


def test_the_end_of_text_token_is_a_stop_sequence_where_it_does_not_end_the_text_itself() -> None:
    ids = ids_of("the fox<eos>over")
    for ignored, reason in ((False, "eos_token"), (True, "stop_sequence")):
        _, finish = generate(ids, "<eos>", ignore_eos=ignored)
        assert finish is not None and (finish.reason, finish.text) == (reason, "the fox")
    assert generate(ids, "x<eos>o", ignore_eos=True)[1].text == "the foxo"  # type: ignore[union-attr]


def test_half_a_character_before_a_stop_is_shown_as_what_it_is() -> None:
    half = ids_of("日")[:1]
    _, finish = generate([*ids_of("a"), *half, IM_END], "<|im_end|>")
    assert finish is not None and (finish.reason, finish.text) == ("stop_sequence", "a\ufffd")


@settings(max_examples=200)
@given(
    ids=st.lists(st.sampled_from([*ASCII, EOS, IM_END, THINK, IM_END, THINK]), min_size=1, max_size=25),
    cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=3),
)
def test_the_text_ends_where_a_search_of_the_whole_would_end_it(
    ids: list[int], cuts: list[tuple[int, int]]
) -> None:
    whole = TOKENIZER.decode(ids, skip_special_tokens=False)
    stops = [piece for start, size in cuts if (piece := whole[start : start + size])]
    _, finish = generate(ids, *stops, ignore_eos=True)
    expected = TOKENIZER.decode(ids, skip_special_tokens=True)
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count], skip_special_tokens=False)
        if ends := [text.index(stop) + len(stop) for stop in stops if stop in text]:
            expected = TOKENIZER.decode(ids[:count], skip_special_tokens=True)
            if ids[count - 1] not in (EOS, IM_END):
                expected = expected[: len(expected) - (len(text) - min(ends))]
            break
    assert finish is not None and finish.text == expected
    assert finish.reason == ("stop_sequence" if stops else "length")


@settings(max_examples=100)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20), st.integers(0, len(TOKENIZER) - 1))
def test_a_peek_tells_what_a_push_would_and_changes_nothing(ids: list[int], next_id: int) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    for token_id in ids:
        detokenizer.push(token_id)
    told = detokenizer.peek(next_id)
    assert detokenizer.push(next_id) == told
