"""Preparing a run: the id follows from what decides the outcome, faults come before work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soppu.errors import ConfigError, DataError, SoppuError
from soppu.stages.run import Run, open_run, prepare


def test_the_same_configuration_is_the_same_run(config_path: Path) -> None:
    assert prepare(str(config_path)) == prepare(str(config_path))


def test_another_seed_or_another_text_is_another_run(config_path: Path, run: Run) -> None:
    assert prepare(str(config_path), {"seed": 1}) != str(run.folder)
    with (Path(run.config.data.source) / "ann.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"user_id": "ann", "prompt": "new", "completion": "words"}))
    assert prepare(str(config_path)) != str(run.folder)


def test_a_prepared_run_names_every_user_and_absolute_paths(run: Run) -> None:
    assert run.config.data.users == ("ann", "bob", "cleo")
    for path in (run.config.runs, run.config.base.model, run.config.registry.root, run.config.serve.state):
        assert Path(path).is_absolute()


def test_overrides_win_and_unknown_ones_are_refused(config_path: Path) -> None:
    assert open_run(prepare(str(config_path), {"compress.rank": 3})).config.compress.rank == 3
    with pytest.raises(ConfigError, match=r"unknown key compress\.rnak"):
        prepare(str(config_path), {"compress.rnak": 3})


def test_a_user_with_too_little_text_stops_the_run_before_it_starts(config_path: Path, run: Run) -> None:
    line = json.dumps({"user_id": "dan", "prompt": "p", "completion": "c"})
    (Path(run.config.data.source) / "dan.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"user 'dan' has 0 examples to train on"):
        prepare(str(config_path))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        open_run(str(tmp_path))


def test_a_run_that_was_wiped_has_another_identity(config_path: Path, run: Run) -> None:
    before = run.identity
    assert open_run(prepare(str(config_path))).identity == before
    (run.folder / "birth").unlink()
    assert open_run(prepare(str(config_path))).identity != before


def test_runs_that_differ_only_after_the_training_share_its_folder(config_path: Path) -> None:
    def federation(**overrides: object) -> Path:
        named = {key.replace("__", "."): value for key, value in overrides.items()}
        return (Path(prepare(str(config_path), named)) / "federation").resolve()

    plain = federation()
    assert federation(compress__rank=3) == plain
    assert federation(federation__timeout_s=5) == plain
    assert federation(federation__learning_rate=0.5) != plain
    assert federation(seed=1) != plain


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"plan.adapter_layers": 40}, r"plan\.adapter_layers: found 40"),
        ({"lora.target_modules": ["nope"]}, r"lora\.target_modules: no nope"),
        ({"align.source": "absent.jsonl"}, r"absent\.jsonl: no such file"),
        ({"compress.device": "cuda:99"}, "cuda:99"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_started(
    config_path: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(SoppuError, match=message):
        prepare(str(config_path), overrides)


def test_a_user_id_that_cannot_be_stored_is_refused(config_path: Path, run: Run) -> None:
    lines = [{"user_id": "a\x07@b", "prompt": str(n), "completion": "c"} for n in range(20)]
    (Path(run.config.data.source) / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SoppuError, match=r"a\\x07@b.*U\+0007"):
        prepare(str(config_path))


def test_an_address_as_a_user_id_is_stored_escaped(config_path: Path, run: Run) -> None:
    lines = [{"user_id": "a@b", "prompt": str(n), "completion": "c"} for n in range(20)]
    (Path(run.config.data.source) / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "a%40b" in open_run(prepare(str(config_path))).config.data.users
    for name in ("a@b", "a%40b"):
        assert open_run(prepare(str(config_path), {"data.users": [name]})).config.data.users == ("a%40b",)


def test_other_public_text_is_another_training(config_path: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.jsonl"
    found = set()
    for text in ("one", "two"):
        lines = [{"user_id": "p", "prompt": f"{text} {n}", "completion": "c"} for n in range(4)]
        public.write_text("\n".join(map(json.dumps, lines)))
        run = prepare(str(config_path), {"align.source": str(public)})
        found.add((Path(run) / "federation").resolve())
    assert len(found) == 2
