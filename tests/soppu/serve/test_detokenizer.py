"""Tokens become text one by one: the pieces add up to the decoded whole, and no character comes by halves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from soppu.serve.engine.text import Detokenizer
from tests.soppu.serve import tiny


@settings(max_examples=150)
@given(st.lists(st.integers(0, len(tiny.tokenizer()) - 1), max_size=30))
def test_deltas_of_any_tokens_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    detokenizer = Detokenizer(tiny.tokenizer())
    deltas = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(deltas) + detokenizer.flush() == tiny.tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=100)
@given(st.text(max_size=12))
def test_deltas_of_real_text_never_show_half_a_character(value: str) -> None:
    ids = tiny.tokenizer()(value)["input_ids"]
    detokenizer = Detokenizer(tiny.tokenizer())
    shown = ""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert value.startswith(shown)
    assert shown + detokenizer.flush() == value


@settings(max_examples=150)
@given(st.lists(st.integers(0, 31), max_size=10))
def test_deltas_keep_the_spaces_of_a_tokenizer_that_strips_the_first(ids: list[int]) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=31, show_progress=False)
    backend.train_from_iterator(["so many words in so many lines so in many words"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    detokenizer = Detokenizer(tokenizer)
    shown = "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()
    assert shown == tokenizer.decode(ids)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 258), max_size=14), st.text(max_size=6))
def test_byte_tokens_that_are_no_characters_never_break_a_text(ids: list[int], value: str) -> None:
    vocabulary = {"<unk>": 0, "\u2581": 1, "a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")

    def deltas(ids: list[int]) -> str:
        detokenizer = Detokenizer(tokenizer)
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()

    assert deltas([2, *(3 + byte for byte in value.encode())]) == "a" + value
    assert deltas([2, *ids, 2]).startswith("a") and deltas([2, *ids, 2]).endswith("a")
