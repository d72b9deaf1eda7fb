"""Every format gives the same rows, and what is wrong with a file is said in one line that names it."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from soppu import data
from soppu.data import Example
from soppu.errors import DataError
from tests.soppu.data.conftest import Counter, pairs, settings_of, write_rows

ROWS = [*pairs("alice"), *pairs("bob", 5)]
BOM = b"\xef\xbb\xbf"


def _table(folder: Path, name: str) -> Path:
    """ROWS in the format that the name says."""
    path = folder / name
    lines = "\n".join(map(json.dumps, ROWS))
    if name.endswith("sv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "array.json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name in ("table.parquet", "dataset", "splits"):
        from datasets import Dataset, DatasetDict

        rows = Dataset.from_list(ROWS)
        if name == "table.parquet":
            rows.to_parquet(path)
        else:
            both = DatasetDict({"train": rows, "test": Dataset.from_list(pairs("tester"))})
            (rows if name == "dataset" else both).save_to_disk(path)
    elif name.startswith("bom"):
        path.write_bytes(BOM + lines.replace("\n", "\r\n").encode())
    else:
        path.write_text(lines)
    return path


NAMES = [
    "plain.jsonl",
    "lines.json",
    "array.json",
    "bom-crlf.jsonl",
    "table.csv",
    "table.tsv",
    "packed.jsonl.gz",
    "table.parquet",
    "dataset",
    "splits",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_users(name: str, tmp_path: Path) -> None:
    config = settings_of(_table(tmp_path, name))
    plain = settings_of(write_rows(tmp_path / "plain" / "x.jsonl", ROWS))
    assert data.list_users(config) == ["alice", "bob"]
    for user in ("alice", "bob"):
        assert data.load_user(config, user) == data.load_user(plain, user)
    assert data.load_public(config.source, limit=99) == data.load_public(plain.source, limit=99)


def test_a_byte_order_mark_and_crlf_are_no_part_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(BOM + b'user_id,prompt,completion\r\na,NA,007\r\na,"x\r\ny",nan\r\na,,"1,5"\r\n')
    found = data.load_user(settings_of(path), "a")
    read = {(item.prompt, item.completion) for item in found.examples}
    assert read == {("NA", "007"), ("x\r\ny", "nan"), ("", "1,5")}  # no cell becomes a number or goes missing


def test_data_files_as_the_hub_names_them_are_of_one_split(tmp_path: Path) -> None:
    from datasets import Dataset

    for split, user in (("train", "alice"), ("test", "tester")):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_list(pairs(user)).to_parquet(path)
    assert data.list_users(settings_of(tmp_path)) == ["alice"]
    assert data.list_users(settings_of(tmp_path, split="test")) == ["tester"]
    with pytest.raises(DataError, match=r"has the splits test, train; data\.split = 'dev' is none of them"):
        data.list_users(settings_of(tmp_path, split="dev"))


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_chats_times_and_numbers_of_a_typed_table_are_read(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {
            "author": 7 + n % 2,
            "messages": [
                {"role": "user", "content": f"ask {n}"},
                {"role": "assistant", "content": f"tell {n}"},
            ],
            "at": datetime(2026, 1, 1 + n, tzinfo=UTC),
            "picture": b"\xff\xd8",
        }
        for n in range(16)
    ]
    path = tmp_path / kind
    if kind == "parquet":
        path = tmp_path / "x.parquet"
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    config = settings_of(path, user_column="author", date_column="at")
    assert data.list_users(config) == ["7", "8"]
    found = data.load_user(config, "7")
    assert {item.turns[1] for item in found.heldout} == {("assistant", "tell 12"), ("assistant", "tell 14")}
    with pytest.raises(DataError, match="lacks the text key user_id.*the row has: "):
        data.list_users(settings_of(path))


def test_public_text_may_be_of_any_format(tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("Something that everybody knows.\n\nAnd something else.\n")
    write_rows(tmp_path / "more.jsonl", [{"text": "A third thing."}])
    found = data.load_public(str(tmp_path), limit=9)
    assert sorted(item.completion for item in found) == [
        "A third thing.",
        "Something that everybody knows.\n\nAnd something else.\n",
    ]
    assert all(item.plain for item in found)


def test_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    rows = [{"who": "a", "frage": f"q{n}", "antwort": "x"} for n in range(4)]
    path = write_rows(tmp_path / "de.jsonl", rows)
    with pytest.raises(DataError) as caught:
        data.list_users(settings_of(path))
    for part in (
        "the row has: who, frage, antwort",
        "data.columns",
        "data.user_column",
        "messages",
        "conversations",
    ):
        assert part in str(caught.value)
    config = settings_of(path, user_column="who", columns=("prompt=frage", "completion=antwort"))
    assert data.list_users(config) == ["a"]
    assert data.load_user(config, "a").train[0].completion == "x"


# ---- what is wrong with a file


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


GOOD = json.dumps(pairs("a")[0]).encode()
CHAT: dict[str, Any] = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def chat(*turns: Any) -> bytes:
    return json.dumps({"user_id": "a", "messages": turns}).encode()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", GOOD + b"\n\xff", "x.jsonl:2: not JSON in UTF-8"),
        (
            "x.jsonl",
            b'{"user_id": "a", "prompt": "\\ud800", "completion": "c"}',
            "x.jsonl:1: not JSON in UTF-8",
        ),
        ("x.jsonl", "é".encode("utf-16"), "looks like UTF-16, save it as UTF-8"),
        ("x.json", b"[" + GOOD, "x.json: not JSON"),
        ("x.json", b"[" + GOOD + b", 7]", "x.json:2: lacks the text key"),
        ("x.csv", b"user_id,prompt,completion\na,p\n", "x.csv:2: 2 cells, the header has 3"),
        ("x.csv", b'user_id,prompt,completion\na,p,"c', "x.csv:2: not CSV"),
        ("x.csv", b"user_id,prompt,completion\na,p,\xe9\n", "x.csv:2: not UTF-8"),
        ("x.csv", b"user_id,prompt,prompt\na,p,c\n", "column prompt twice"),
        ("x.csv", b"user_id;prompt;completion\na;p;c\n", "the row has: user_id;prompt;completion"),
        ("x.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-20], "x.jsonl.gz: not whole as gzip"),
        ("x.jsonl.gz", GOOD, "x.jsonl.gz: not whole as gzip"),
        (
            "x.jsonl",
            GOOD + b'\n{"user_id": "a", "prompt": ["p"], "completion": "c"}',
            ":2: .*prompt holds a list",
        ),
        (
            "x.jsonl",
            GOOD + b'\n{"user_id": "a", "prompt": "p", "completion": NaN}',
            "completion holds no value",
        ),
        ("x.jsonl", b'{"user_id": "a", "text": " "}', "x.jsonl:1: text is empty"),
        ("x.jsonl", chat(*reversed(CHAT)), "turn 1 is the assistant's, expected the user's"),
        ("x.jsonl", chat(CHAT[0], *CHAT), "turn 2 is the user's, expected the assistant's"),
        (
            "x.jsonl",
            chat(*CHAT, {"role": "system", "content": "s"}),
            "turn 3 is the system's, expected the user's",
        ),
        ("x.jsonl", chat(CHAT[0], {"role": "assistant", "content": ""}), "turn 2: content is empty"),
        ("x.jsonl", chat(CHAT[0], {"role": "assistant", "content": ["a"]}), "turn 2: content holds a list"),
        ("x.jsonl", chat({"role": "tool", "content": "x"}), "turn 1: role is 'tool', allowed: system, user"),
        ("x.jsonl", chat(CHAT[0]), "no turn of the assistant"),
        (
            "x.jsonl",
            b'{"user_id": "a", "messages": "hello"}',
            "holds a str, needed: a list of {role, content}",
        ),
        ("x.jsonl", b'{"user_id": "a", "conversations": [{"from": "gpt"}]}', "turn 1: value holds no value"),
        (
            "x.jsonl",
            b'{"user_id": "a", "prompt": "p", "completion": "c", "date": "soon"}',
            "date = 'soon' is no time",
        ),
        ("x.docx", b"PK", "x.docx: not of a format that is read; give a file ending in .jsonl"),
    ],
)
def test_a_bad_file_is_named_in_one_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as caught:
        data.list_users(settings_of(_write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "nested", "null"])
def test_a_bad_parquet_is_named_in_one_line(damage: str, tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "x.parquet"
    rows = pairs("a")
    if damage == "nested":
        rows = [{**row, "prompt": {"deep": "p"}} for row in rows]
    if damage == "null":
        rows[3]["completion"] = None
    Dataset.from_list(rows).to_parquet(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "empty":
        path.write_bytes(b"")
    said = {"cut": "cannot be read after row 0", "empty": "cannot be read after row 0"}
    said |= {
        "nested": "x.parquet:1: .*prompt holds a dict",
        "null": "x.parquet:4: .*completion holds no value",
    }
    with pytest.raises(DataError, match=said[damage]) as caught:
        data.list_users(settings_of(path))
    assert "\n" not in str(caught.value)


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    path = _table(tmp_path, "dataset")
    (arrow,) = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="dataset: cannot be read"):
        data.list_users(settings_of(path))


def test_reading_a_dataset_asks_no_hub_and_keeps_no_copy(tmp_path: Path, counter: Counter) -> None:
    sources = [_table(tmp_path, name) for name in ("dataset", "table.parquet")]
    with counter.counting(tmp_path) as counted:
        for source in sources:
            assert data.list_users(settings_of(source)) == ["alice", "bob"]
            data.load_user(settings_of(source), "alice")
    temporary = [name for name in counted.written if Path(name).is_relative_to(tempfile.gettempdir())]
    assert counted.opened and not counted.asked and counted.written == temporary
    assert not [name for name in temporary if Path(name).is_file()]  # without a name, so without a rest
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == [
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
    ]


def test_what_only_the_extra_can_read_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _table(tmp_path, "table.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'soppu\[data\]'"):
        data.list_users(settings_of(path))
    assert data.list_users(settings_of(_table(tmp_path, "table.csv"))) == ["alice", "bob"]


def test_plain_text_is_cut_into_pieces_that_make_it_up_again(tmp_path: Path) -> None:
    text = (
        "\n\n".join(f"Paragraph {n} says {'quite a lot, ' * (n % 9)}and ends." for n in range(80))
        + "x" * 2500
    )
    (tmp_path / "alice.txt").write_bytes(BOM + text.replace("\n", "\r\n").encode())
    found = data.load_user(settings_of(tmp_path, train_examples=999, heldout_examples=999), "alice")
    pieces = {item.completion for item in found.examples}
    assert all(len(piece) <= 1000 for piece in pieces) and len(pieces) > 8
    assert sum(map(len, pieces)) == len(text) and all(piece in text for piece in pieces)
    (tmp_path / "alice.txt").write_text(text + " And more." * 300)
    grown = data.load_user(settings_of(tmp_path, train_examples=999, heldout_examples=999), "alice")
    assert len(pieces - {item.completion for item in grown.examples}) <= 1


def test_examples_of_different_kinds_are_different() -> None:
    kinds = [
        Example("p", "c"),
        Example("", "c"),
        Example.text("c"),
        Example.chat((("user", "p"), ("assistant", "c"))),
        Example.chat((("user", "p"), ("assistant", "c"), ("user", "p"), ("assistant", "c"))),
    ]
    assert len({item.digest() for item in kinds}) == len(set(kinds)) == len(kinds)
