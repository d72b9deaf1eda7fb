"""The text of a run: faults before work, users left out by name, a change noticed, limits of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from soppu import adapter as adapters
from soppu import models
from soppu.errors import ConfigError, DataError
from soppu.federation import emulator
from soppu.stages import report
from soppu.stages.bench import with_text
from soppu.stages.federate import RESULT, collect, federate
from soppu.stages.run import Run, open_run, prepare


def add_user(run: Run, name: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(run.config.data.source) / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"user_id": name, **row}) for row in rows))
    return path


def pair(n: int = 0) -> dict[str, str]:
    return {"prompt": f"say {n}", "completion": "something"}


def test_who_has_too_little_text_is_left_out_by_name(
    config_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    add_user(run, "dan", [pair()])
    add_user(run, "eve@x.org", [pair()] * 40)
    (Path(run.config.data.source) / "fay.jsonl").write_text("")
    (Path(run.config.data.source) / "gus.jsonl").write_text("{")
    (Path(run.config.data.source) / "hal.jsonl").symlink_to("/nowhere")
    with pytest.raises(DataError):
        prepare(str(config_path))
    lenient = open_run(prepare(str(config_path), {"data.on_small_user": "leave-out"}))
    assert lenient.config.data.users == ("ann", "bob", "cleo")
    left_out = lenient.read("text.json")["left_out"]
    assert sorted(left_out) == ["dan", "eve%40x.org", "fay", "gus", "hal"]
    assert "has 0 examples to train on" in left_out["dan"] and "0 examples" in left_out["eve%40x.org"]
    assert "user without examples" in left_out["fay"] and "gus.jsonl:1: not JSON" in left_out["gus"]
    assert all(f"left out: user '{user}'" in caplog.text for user in left_out)


def test_a_run_with_nobody_left_is_refused(config_path: Path) -> None:
    with pytest.raises(DataError, match="has nobody to train on: .*data.min_examples is 64"):
        prepare(str(config_path), {"data.on_small_user": "leave-out", "data.min_examples": 64})


def test_federate_on_other_text_is_refused_by_name(config_path: Path, run: Run) -> None:
    path = Path(run.config.data.source) / "bob.jsonl"
    text = path.read_text()
    path.write_text(text.replace("bob says", "somebody says"))
    with pytest.raises(DataError, match=r"text of user 'bob' in .* has changed since .* prepare again"):
        federate(str(run.folder))
    path.write_text("\n".join(text.splitlines()[:2]))
    with pytest.raises(
        DataError, match=r"user 'bob' .* changed .*has \d examples to train on.* prepare again"
    ):
        federate(str(run.folder))
    path.unlink()
    with pytest.raises(DataError, match=r"user 'bob' .* changed .*is not in .* prepare again"):
        federate(str(run.folder))


def test_text_that_this_run_does_not_read_may_change(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, who came later, is another run's: nobody is named, and the rounds begin."""
    from soppu.federation import simulation

    class Began(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise Began

    monkeypatch.setattr(simulation, "run", begin)
    add_user(run, "dan", [pair(n) for n in range(12)])
    with pytest.raises(Began):
        federate(str(run.folder))


@pytest.mark.parametrize("layout", ["chats.jsonl", "table.csv", "packed.jsonl.gz", "folder"])
def test_a_change_in_any_format_is_another_input_of_the_stages_that_read_it(
    layout: str, config_path: Path, tmp_path: Path
) -> None:
    import gzip

    def write(word: str) -> Path:
        path = tmp_path / layout
        chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": word}]}
        if layout == "folder":
            (path / "ann").mkdir(parents=True, exist_ok=True)
            (path / "ann" / "x.txt").write_text(word)
        elif layout == "table.csv":
            path.write_text(f"user_id,text\nann,{word}\n")
        elif layout.endswith(".gz"):
            path.write_bytes(gzip.compress(json.dumps({"user_id": "ann", "text": word}).encode(), mtime=0))
        else:
            path.write_text(json.dumps({"user_id": "ann", **chat}))
        return path

    run = open_run(prepare(str(config_path), {"data.source": str(write("one"))}, text=False))
    before = {stage: run.inputs(stage) for stage in ("federate", "compress", "evaluate")}
    write("two")
    after = {stage: run.inputs(stage) for stage in before}
    assert {stage for stage in before if before[stage] != after[stage]} == {"federate", "evaluate"}
    write("one")
    assert {stage: run.inputs(stage) for stage in before} == before


def test_one_users_text_that_cannot_be_read_leaves_the_others_measured(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(run.config.data.source)
    (folder / "bob.jsonl").write_text("{")
    assert list(with_text(run.config, ["ann", "bob", "cleo", "dan"])) == ["ann", "cleo"]
    assert "not measured" in caplog.text and "bob.jsonl:1: not JSON" in caplog.text
    (folder / "bob.jsonl").unlink()
    assert list(with_text(run.config, ["ann", "bob", "cleo"])) == ["ann", "cleo"]


@pytest.mark.parametrize("served", ["personal", "shared", "base"])
def test_who_was_left_out_is_served_the_shared_adapter_where_adapters_help(
    served: str, config_path: Path, run: Run, trained: dict[str, str]
) -> None:
    add_user(run, "dan", [pair()])
    run = open_run(prepare(str(config_path), {"data.on_small_user": "leave-out"}))
    registry, base = run.registry(), run.base()
    plan = emulator.make_plan(models.load_model(base), base_hash=base.hash, adapter_layers=2, drop_ratio=0.0)
    adapters.write(registry.get_adapter(trained["ann"]), run.folder / "federation" / "shared")
    told = {"adapters": trained, "served": dict.fromkeys(trained, served), "shared": "shared"}
    run.write(RESULT, {**told, "plan": {"json": plan.to_json()}})
    registry.put_adapter(registry.get_adapter(trained["bob"]), user="eve")
    members = registry.get_set(collect(str(run.folder), federate(str(run.folder))))
    assert ("dan" in members) == (served != "base") and members["eve"] == trained["bob"]
    if served != "base":
        assert members["dan"] == trained["ann"]


def test_the_report_names_who_was_left_out_beside_who_was_refused(config_path: Path, run: Run) -> None:
    add_user(run, "dan", [pair()])
    run = open_run(prepare(str(config_path), {"data.on_small_user": "leave-out"}))
    assert report._federation(run) is None  # a recompression reports of none
    run.write(RESULT, {"adapters": {}, "refused": {"bob": "holds another layer plan"}})
    told = report._federation(run)
    assert told and told["refused"]["bob"] == "holds another layer plan"
    assert "has 0 examples to train on" in told["refused"]["dan"]


# ---- what the model takes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.max_tokens": 257}, r"data\.max_tokens = 257: allowed: at most 256"),
        ({"align.max_tokens": 300}, r"align\.max_tokens = 300: allowed: at most 256"),
    ],
)
def test_more_tokens_than_the_model_has_positions_is_said_before_any_work(
    config_path: Path, overrides: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(str(config_path), overrides)
    assert prepare(str(config_path), {"data.max_tokens": 256, "align.max_tokens": 256})


def with_tokens(tiny_base: Path, folder: Path, *, special: str = "", more: int = 8) -> Path:
    """The base model with a tokenizer that has been given more tokens than the model has rows for."""
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{n}>" for n in range(more)])
    if special:
        tokenizer.pad_token = special
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_that_the_model_does_not_have_is_refused_where_text_holds_it(
    config_path: Path, run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    model = str(with_tokens(tiny_base, tmp_path / "base"))
    assert prepare(str(config_path), {"base.model": model})  # it has such tokens, no text does
    rows = [pair(n) for n in range(40)]
    add_user(run, "dan", [{**row, "prompt": f"{row['prompt']} <more7>"} for row in rows])
    with pytest.raises(
        DataError, match=r"user 'dan': the text holds '<more7>', token 3\d\d of the tokenizer"
    ):
        prepare(str(config_path), {"base.model": model})
    lenient = prepare(str(config_path), {"base.model": model, "data.on_small_user": "leave-out"})
    assert open_run(lenient).config.data.users == ("ann", "bob", "cleo")


def test_a_padding_token_that_the_model_does_not_have_is_refused(
    config_path: Path, tiny_base: Path, tmp_path: Path
) -> None:
    model = str(with_tokens(tiny_base, tmp_path / "base", special="<more7>"))
    with pytest.raises(
        ConfigError, match=r"base\.model = .*has token 3\d\d \('<more7>'\), the model has 320"
    ):
        prepare(str(config_path), {"base.model": model})


def test_chats_are_tried_on_the_template_before_any_work(config_path: Path, run: Run) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats = [{"messages": [{"role": "system", "content": f"{n}"}, *turns]} for n in range(40)]
    add_user(run, "dan", chats)
    with pytest.raises(DataError, match=r"user 'dan': .*no chat template; set data\.chat_template"):
        prepare(str(config_path))
    check = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    picky = f"{{% for m in messages %}}{check}{{% endfor %}}"
    with pytest.raises(DataError, match=r"user 'dan': the chat template refuses .*no system"):
        prepare(str(config_path), {"data.chat_template": picky})
    plain = open_run(prepare(str(config_path), {"data.chat_template": "plain"}))
    assert plain.config.data.users == ("ann", "bob", "cleo", "dan")
