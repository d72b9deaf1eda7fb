"""`soppu data`: who has text, how much, who would be left out and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu.cli import main


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, words)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for user, count in (("alice@example.com", 9), ("bob", 1)):
        rows = [{"prompt": f"ask {n}", "completion": f"tell {n}"} for n in range(count)]
        (folder / f"{user}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "carol.jsonl").write_text("{")
    (folder / "notes.docx").write_text("x")
    return folder


def test_everybody_is_listed_and_who_would_end_a_run_is_named(source: Path) -> None:
    done = soppu(source, "--set", "min_examples=2")
    assert done.exit_code == 1, done.output
    assert [line.split()[0] for line in done.output.splitlines()[:4]] == [
        "USER",
        "alice@example.com",
        "bob",
        "carol",
    ]
    assert "user 'bob' has 0 examples to train on" in done.output
    assert "carol.jsonl:1: not JSON" in done.output
    assert "3 users, 2 left out" in done.output and "notes.docx" in done.output


def test_leaving_out_is_no_failure_and_json_tells_the_same(source: Path) -> None:
    done = soppu(source, "--set", "min_examples=2", "--set", "on_small_user=leave-out", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    alice, bob, carol = told["users"]
    assert (alice["user"], alice["id"], alice["train"] + alice["validation"] + alice["held_out"]) == (
        "alice@example.com",
        "alice%40example.com",
        9,
    )
    assert alice["tokens"] is None and not alice["left_out"]
    assert bob["left_out"] and carol["left_out"]
    assert [Path(name).name for name in told["passed_over"]] == ["notes.docx"]


def test_tokens_are_those_of_the_model_and_its_template_is_tried(source: Path, tiny_base: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows = [{"messages": [*chat["messages"], *chat["messages"]]}, chat]
    (source / "carol.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (
        source,
        "--set",
        "min_examples=1",
        "--set",
        "users=['alice@example.com', 'carol']",
        "--model",
        tiny_base,
    )
    alice, carol = json.loads(soppu(*words, "--json").output)["users"]
    assert alice["tokens"] > 9 * 3
    assert "no chat template; set data.chat_template" in carol["left_out"]
    done = soppu(*words, "--set", "chat_template=plain", "--json")
    assert done.exit_code == 0 and json.loads(done.output)["users"][1]["tokens"] > 10


def test_settings_come_from_a_configuration(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'[data]\nsource = "{source}"\nusers = ["bob"]\nmin_examples = 1\n')
    assert "1 users, 1 left out" in soppu("--config", path).output
    assert "1 users, 0 left out" in soppu("--config", path, "--set", "users=['alice@example.com']").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "/nowhere: no such file or folder"),
        (["x", "--set", "min_examples"], "expected KEY=VALUE"),
        (["x", "--set", "min_exmaples=2"], "did you mean min_examples?"),
        (["x", "--set", "user_from=line"], "allowed: auto, column, file, folder"),
        (["x", "--set", "columns=['prompt']"], "allowed: MEANING=COLUMN"),
        (["x", "--set", "columns=['question=q']"], "MEANING of messages, conversations, prompt"),
    ],
)
def test_a_fault_is_one_line(words: list[str], said: str) -> None:
    done = soppu(*words)
    assert done.exit_code and said in done.output and "Traceback" not in done.output
