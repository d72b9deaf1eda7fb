"""From text to blocks: faults by file and line, a split that does not move, a mask on the prompt."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from soppu import corpus, data
from soppu.data import IGNORE, Block, Example
from soppu.data_settings import DataConfig
from soppu.errors import DataError


def line(user: str, number: int = 0, **changes: Any) -> str:
    values = {"user_id": user, "prompt": f"{user} asks {number}", "completion": f"answer {number}"}
    return json.dumps({**values, **changes})


def settings_for(source: Path, **changes: Any) -> DataConfig:
    values = {"min_examples": 4, "train_examples": 8, "heldout_examples": 3, **changes}
    return DataConfig(source=str(source), **values)


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """One file, two users: alice with twelve examples, bob with five."""
    path = tmp_path / "users.jsonl"
    lines = [line("alice", n) for n in range(12)] + [line("bob", n) for n in range(5)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


# ---- reading


def test_users_of_a_file_and_of_a_folder_are_the_same(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for user in ("alice", "bob"):
        mine = [text for text in both.read_text().splitlines() if f'"{user}"' in text]
        (folder / f"{user}.jsonl").write_text("\n".join(mine))
    assert data.list_users(settings_for(both)) == data.list_users(settings_for(folder)) == ["alice", "bob"]
    for user in ("alice", "bob"):
        assert data.load_user(settings_for(both), user) == data.load_user(settings_for(folder), user)


def test_named_users_keep_their_order(both: Path) -> None:
    assert data.list_users(settings_for(both, users=("bob", "alice"))) == ["bob", "alice"]


def test_an_unknown_user_is_named_with_those_there_are(both: Path) -> None:
    with pytest.raises(DataError, match=r"data\.users: carol not in .*users\.jsonl; it has alice, bob"):
        data.list_users(settings_for(both, users=("alice", "carol")))
    with pytest.raises(DataError, match=r"user 'carol' is not in .*; it has alice, bob"):
        data.load_user(settings_for(both), "carol")
    with pytest.raises(DataError, match=r"data\.users: no_such_package not in stdlib; it has .*email"):
        data.list_users(DataConfig(users=("no_such_package",)))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{not json", "not JSON"),
        ('{"user_id": "a", "prompt": "p"', "not JSON"),
        ('{"user_id": "a", "prompt": "p"}', "lacks the text key completion; needed: user_id, prompt"),
        ('{"completion": "c"}', "lacks the text key user_id, prompt"),
        ('{"user_id": 7, "prompt": "p", "completion": "c"}', "lacks the text key user_id"),
        ('["a", "p", "c"]', "lacks the text key"),
        ("3", "lacks the text key"),
        ('{"user_id": "a", "prompt": "p", "completion": ""}', "user 'a': completion is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join([line("a"), "", text, line("a", 1)]))
    with pytest.raises(DataError) as caught:
        data.list_users(settings_for(path))
    assert str(caught.value).startswith(f"{path}:3: {fault}")


def test_a_line_separator_inside_a_text_is_not_the_end_of_a_line(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+0085 and DEL as they are; only a newline ends a line of JSONL."""
    path = tmp_path / "notes.jsonl"
    odd = "one\u2028two\u2029three\x85four\x7ffive"
    lines = [line("a", n) for n in range(8)]
    lines.append(json.dumps({"user_id": "a", "prompt": odd, "completion": odd}, ensure_ascii=False))
    path.write_text("\r\n".join(lines), encoding="utf-8")
    user = data.load_user(settings_for(path), "a")
    assert Example(odd, odd) in user.train + user.heldout


def test_a_user_without_examples_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "alice.jsonl").write_text(line("alice"))
    (tmp_path / "bob.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"bob\.jsonl: user without examples"):
        data.list_users(settings_for(tmp_path))


def test_a_user_with_too_few_examples_is_an_error(both: Path) -> None:
    with pytest.raises(DataError, match=r"user 'bob' has 4 examples to train on in .* \(1 are held out\)"):
        data.load_user(settings_for(both, min_examples=5), "bob")
    enough = data.load_user(settings_for(both, min_examples=4), "bob")
    assert len(enough.train) + len(enough.validation) == 4


def test_repeated_lines_count_once(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join([line("a")] * 50))
    with pytest.raises(DataError, match="has 0 examples to train on"):
        data.load_user(settings_for(path), "a")


@pytest.mark.parametrize("name", ["absent.jsonl", "absent"])
def test_an_absent_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: no such file or folder, and not 'stdlib'"):
        data.list_users(settings_for(tmp_path / name))


def test_a_folder_without_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(DataError, match=r"no \*\.jsonl files"):
        data.list_users(settings_for(tmp_path))


# ---- the split


def test_the_split_is_disjoint_and_every_user_has_something_held_out(both: Path) -> None:
    user = data.load_user(settings_for(both), "alice")
    parts = (user.train, user.validation, user.heldout)
    assert all(parts) and len(set().union(*parts)) == sum(map(len, parts))
    assert len(user.train) + len(user.validation) >= 8 and len(user.heldout) <= 3
    small = data.load_user(settings_for(both), "bob")
    assert (len(small.train), len(small.validation), len(small.heldout)) == (3, 1, 1)


def test_what_is_chosen_with_is_never_trained_on_and_never_judged_by(both: Path) -> None:
    whole = data.load_user(settings_for(both), "alice")
    short = data.load_user(
        settings_for(both, train_examples=4, validation_examples=1, heldout_examples=1), "alice"
    )
    assert len(short.validation) == 1 and set(short.validation) <= set(whole.validation)
    assert not set(short.train) & set(whole.validation)
    assert not set(short.heldout) & set(whole.validation)
    least = data.load_user(settings_for(both, min_examples=1, users=("bob",)), "bob")
    assert least.train and least.validation


@settings(max_examples=40)
@given(
    one=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8)),
    two=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8)),
    grown=st.integers(0, 20),
)
def test_nothing_is_measured_on_text_that_any_configuration_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
    one: tuple[int, int, int],
    two: tuple[int, int, int],
    grown: int,
) -> None:
    path = tmp_path_factory.mktemp("split") / "a.jsonl"

    def load(numbers: tuple[int, int, int], lines: int) -> data.UserData:
        path.write_text("\n".join(line("a", n) for n in range(lines)))
        train, held, least = numbers
        config = settings_for(path, train_examples=train, heldout_examples=held, min_examples=least)
        return data.load_user(config, "a")

    before, after = load(one, 40), load(two, 40 + grown)
    assert not set(before.train) & set(after.heldout)
    assert not set(after.train) & set(before.heldout)
    if len(after.train) + len(after.validation) > 1:
        assert not set(after.train) & set(after.validation)


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(line("a").encode() + b"\n" + line("a").replace("a", "\u00e9").encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not JSON in UTF-8"):
        data.list_users(settings_for(path))
    path.write_text(line("a") + "\n" + r'{"user_id": "a", "prompt": "\ud800", "completion": "c"}')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not JSON in UTF-8"):
        data.list_users(settings_for(path))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), repeats=st.integers(0, 5))
def test_the_split_depends_on_content_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, repeats: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    lines = [line("a", n) for n in range(12)]
    (folder / "one.jsonl").write_text("\n".join(lines))
    shuffled = lines + lines[:repeats]
    random.Random(seed).shuffle(shuffled)
    (folder / "two.jsonl").write_text("\n".join(shuffled))
    one = data.load_user(settings_for(folder / "one.jsonl"), "a")
    two = data.load_user(settings_for(folder / "two.jsonl"), "a")
    assert one == two and one.digest() == two.digest()


def test_digests_change_with_any_part() -> None:
    base = data.UserData("a", (Example("p", "c"),), (Example("o", "b"),), (Example("q", "d"),))
    others = [
        dataclasses.replace(base, validation=()),
        dataclasses.replace(base, train=base.validation, validation=base.train),
        dataclasses.replace(base, user_id="b"),
        dataclasses.replace(base, train=(Example("pc", ""),)),
        dataclasses.replace(base, heldout=()),
        dataclasses.replace(base, train=base.train + base.heldout, heldout=()),
        dataclasses.replace(base, train=base.heldout, heldout=base.train),
    ]
    assert len({item.digest() for item in (base, *others)}) == 8


def test_the_built_in_users_come_without_any_file() -> None:
    config = DataConfig(users=("json",), train_examples=10, heldout_examples=4)
    user = data.load_user(config, "json")
    known = {Example(*pair) for pair in corpus.functions("json")}
    assert (len(user.train), len(user.heldout)) == (10, 4)
    assert set(user.train) | set(user.validation) | set(user.heldout) <= known


def test_public_text_comes_from_the_library_or_a_file(both: Path, tmp_path: Path) -> None:
    assert len(data.load_public("stdlib-public", limit=5)) == 5
    assert len(data.load_public(str(both), limit=100)) == 17
    assert data.load_public(str(both), limit=3) == data.load_public(str(both), limit=100)[:3]
    with pytest.raises(DataError, match="no such file"):
        data.load_public(str(tmp_path / "absent"), limit=3)


# ---- tokens


def test_the_prompt_is_masked_and_the_end_is_learned(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (block,) = data.tokenize([Example("def main():\n", "return 0")], tiny_tokenizer, max_tokens=64)
    prompt = tiny_tokenizer.encode("def main():\n")
    completion = [*tiny_tokenizer.encode("return 0"), tiny_tokenizer.eos_token_id]
    assert block.ids.tolist() == prompt + completion
    assert block.labels.tolist() == [IGNORE] * len(prompt) + completion


@settings(max_examples=60)
@given(
    prompt=st.text(st.characters(codec="ascii"), max_size=80),
    completion=st.text(st.characters(codec="ascii"), min_size=1, max_size=80),
    limit=st.integers(16, 40),
)
def test_blocks_fit_and_always_have_something_to_learn(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, limit: int
) -> None:
    (block,) = data.tokenize([Example(prompt, completion)], tiny_tokenizer, max_tokens=limit)
    whole = tiny_tokenizer.encode(prompt)
    kept = int((block.labels == IGNORE).sum())
    assert len(block.ids) == len(block.labels) <= limit
    assert kept == min(len(whole), limit // 2)
    assert block.ids[:kept].tolist() == whole[len(whole) - kept :]  # the end of the prompt, not its start
    assert torch.equal(block.ids[kept:], block.labels[kept:])
    assert len(block.ids) > kept


def test_collate_pads_on_the_right() -> None:
    blocks = [
        Block(torch.tensor([5, 6, 7]), torch.tensor([IGNORE, 6, 7])),
        Block(torch.tensor([8]), torch.tensor([8])),
    ]
    ids, mask, labels = data.collate(blocks, pad_id=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


def test_a_token_that_looks_like_padding_is_not_masked() -> None:
    """A model without a padding token pads with its end of text, which texts hold too."""
    block = Block(torch.tensor([5, 1, 1]), torch.tensor([IGNORE, 1, 1]))
    _, mask, labels = data.collate([block], pad_id=1)
    assert mask.tolist() == [[1, 1, 1]] and labels.tolist() == [[IGNORE, 1, 1]]


class BeginsWithSeven:
    """A tokenizer that begins every text with token 7, as Llama's does with its BOS."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens + [10 + int(digit) for digit in text]


def test_a_cut_prompt_keeps_the_token_every_text_begins_with() -> None:
    (block,) = data.tokenize([Example("123456", "89")], BeginsWithSeven(), max_tokens=8)
    assert block.ids.tolist() == [7, 14, 15, 16, 18, 19, 0]
