"""What of a chat is learned: by markers and by difference the same, in one block or in many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from soppu import data
from soppu.data import IGNORE, Example, chat
from soppu.errors import DataError

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[assistant]"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{{ '\n' }}"
    "{% else %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen3's: what the assistant thought is left out of turns that others follow.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = (
    ("system", "be kind"),
    ("user", "hi"),
    ("assistant", "well met"),
    ("user", "bye"),
    ("assistant", "so long"),
)


def learned(block: data.Block, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(block.labels[block.labels != IGNORE])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_only_the_assistants_turns_and_their_ends_are_learned(
    template: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (block,) = data.tokenize([Example.chat(TALK)], tiny_tokenizer, max_tokens=256, chat_template=template)
    assert learned(block, tiny_tokenizer) == "well met<eos>so long<eos>"
    assert tiny_tokenizer.decode(block.ids).count("[assistant]") == 2


_words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
).filter(str.strip)


@settings(max_examples=60)
@given(
    system=st.none() | _words,
    said=st.lists(st.tuples(_words, _words), min_size=1, max_size=4),
)
def test_markers_and_differences_tell_the_same(
    system: str | None, said: list[tuple[str, str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    turns: list[tuple[str, str]] = [("system", system)] if system else []
    for asked, answered in said:
        turns += [("user", asked), ("assistant", answered)]
    one = chat.marked(turns, tiny_tokenizer, MARKED)
    two = chat.by_difference(turns, tiny_tokenizer, UNMARKED)
    assert one == two
    assert chat.tokens(turns, tiny_tokenizer, MARKED) == chat.tokens(turns, tiny_tokenizer, UNMARKED)


def test_a_template_that_forgets_needs_markers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    short = (("user", "hi"), ("assistant", "<think>hm</think>well met"))
    ids, mask = chat.tokens(short, tiny_tokenizer, FORGETFUL)
    assert tiny_tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]).startswith("<think>hm")
    with pytest.raises(DataError, match=r"turn 2 of user, assistant, user, assistant otherwise.*generation"):
        chat.tokens((*short, ("user", "bye"), ("assistant", "so long")), tiny_tokenizer, FORGETFUL)


def test_without_a_template_the_key_is_named_and_plain_is_one(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match=r"no chat template; set data\.chat_template .*'plain'"):
        data.tokenize([Example.chat(TALK)], tiny_tokenizer, max_tokens=256)
    (block,) = data.tokenize([Example.chat(TALK)], tiny_tokenizer, max_tokens=256, chat_template="plain")
    assert tiny_tokenizer.decode(block.ids) == (
        "System: be kind\nUser: hi\nAssistant: well met<eos>\nUser: bye\nAssistant: so long<eos>\n"
    )
    assert learned(block, tiny_tokenizer) == "well met<eos>so long<eos>"


class Owner:
    """A tokenizer with a template of its own."""

    def __init__(self, own: Any) -> None:
        self.chat_template = own


def test_the_tokenizers_own_template_is_used_unless_another_is_set() -> None:
    assert chat.template_of(Owner(MARKED)) == MARKED  # type: ignore[arg-type]
    assert chat.template_of(Owner({"default": MARKED, "tool": "x"})) == MARKED  # type: ignore[arg-type]
    assert chat.template_of(Owner(MARKED), "mine") == "mine"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system turns here') }}", "refuses a chat of system, user.*no system turns"),
        ("{{ messages[0].nothing.at_all }}", "refuses a chat"),
        ("{% for m in messages %}", "refuses a chat"),
        ("{{ 'x' }}{% if false %}{% generation %}y{% endgeneration %}{% endif %}", "marks nothing"),
        (
            "{% for m in messages %}{{ m.content }}{{ messages|length }}{% endfor %}",
            "otherwise when others",
        ),
    ],
)
def test_a_template_that_does_not_serve_is_one_line(
    template: str, said: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        chat.tokens(TALK, tiny_tokenizer, template)
    assert "\n" not in str(caught.value)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
    limit=st.integers(16, 80),
)
def test_a_long_chat_is_learned_whole_in_blocks_that_fit(
    lengths: list[tuple[int, int]], limit: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [
        turn
        for n, (asked, answered) in enumerate(lengths)
        for turn in (("user", "q" * asked), ("assistant", chr(97 + n) * answered))
    ]
    blocks = data.tokenize(
        [Example.chat(tuple(turns))], tiny_tokenizer, max_tokens=limit, chat_template=MARKED
    )
    whole, mask = chat.tokens(turns, tiny_tokenizer, MARKED)
    assert torch.cat([b.labels[b.labels != IGNORE] for b in blocks]).tolist() == [
        token for token, mine in zip(whole, mask, strict=True) if mine
    ]
    for block in blocks:
        assert len(block.ids) == len(block.labels) <= limit
        assert (block.labels[1:] != IGNORE).any()  # something is predicted in every block
        first = int((block.labels != IGNORE).nonzero()[0])
        assert len(blocks) == 1 or first >= min(limit // 2, whole.index(int(block.labels[first])))


def test_plain_text_is_learned_whole(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the quick brown fox " * 30
    blocks = data.tokenize([Example.text(text)], tiny_tokenizer, max_tokens=32)
    assert len(blocks) > 2 and all(len(block.ids) <= 32 for block in blocks)
    assert all(torch.equal(block.ids, block.labels) for block in blocks)
    assert tiny_tokenizer.decode(torch.cat([block.ids for block in blocks])) == text
    (least,) = data.tokenize([Example.text("x")], tiny_tokenizer, max_tokens=32)
    assert least.labels.tolist() == [*tiny_tokenizer.encode("x"), tiny_tokenizer.eos_token_id]


class BeginsWithSeven:
    """A tokenizer that begins every text with token 7, as Llama's does with its BOS."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens + [10 + int(digit) for digit in text]


def test_every_block_of_plain_text_begins_as_texts_do() -> None:
    blocks = data.tokenize([Example.text("123456")], BeginsWithSeven(), max_tokens=4)
    assert [block.ids.tolist() for block in blocks] == [[7, 11, 12, 13], [7, 14, 15, 16]]
    assert [block.labels.tolist() for block in blocks] == [[IGNORE, 11, 12, 13], [IGNORE, 14, 15, 16]]
