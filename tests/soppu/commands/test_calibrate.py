"""`soppu calibrate` as a person types it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from soppu import calibrate, data, models
from soppu.cli import main

NAMES = [f"model.layers.7.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
LAST = r"model\.layers\.7\..*\.(q|v|down)_proj"


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, words)])


@pytest.fixture
def source(write_users: Callable[[Path, Mapping[str, int]], Path], tmp_path: Path) -> Path:
    return write_users(tmp_path / "text", {"public": 5}) / "public.jsonl"


def test_it_writes_the_moments_of_the_text_it_was_given(
    tiny_base: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    result = soppu(
        tiny_base, "--out", out, "--source", source, "--examples", 3, "--max-tokens", 20, "--modules", LAST
    )
    assert result.exit_code == 0, result.output
    base = models.resolve(str(tiny_base), cache=tmp_path)
    found = calibrate.load(out, base_hash=base.hash)
    texts = data.load_public(str(source), limit=3)
    blocks = data.tokenize(texts, models.load_tokenizer(base), max_tokens=20)
    expected = calibrate.second_moments(models.load_model(base), blocks, NAMES)
    assert sorted(found) == sorted(NAMES)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert f"3 examples, {sum(len(block.ids) for block in blocks)} tokens" in result.stdout
    assert f"{out.stat().st_size:,} bytes" in result.stdout


def test_the_table_has_a_line_for_each_different_input(tiny_base: Path, source: Path, tmp_path: Path) -> None:
    result = soppu(tiny_base, "--out", tmp_path / "m", "--source", source, "--modules", LAST)
    head, shared, down, *_ = result.stdout.splitlines()
    assert head.split() == ["module", "features", "in", "use", "shared", "by"]
    name, features, used, other = shared.split()
    assert (name, features, other) == (NAMES[0], "32", "v_proj")
    assert 1 <= float(used) <= 32
    assert down.split()[:2] == [NAMES[2], "48"]


def test_moments_about_zero_on_request(tiny_base: Path, source: Path, tmp_path: Path) -> None:
    words = (tiny_base, "--out", tmp_path / "m", "--source", source, "--modules", LAST, "--about", "zero")
    assert soppu(*words).exit_code == 0
    base = models.resolve(str(tiny_base), cache=tmp_path)
    blocks = data.tokenize(
        data.load_public(str(source), limit=32), models.load_tokenizer(base), max_tokens=256
    )
    expected = calibrate.second_moments(models.load_model(base), blocks, NAMES, centred=False)
    found = calibrate.load(tmp_path / "m", base_hash=base.hash)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_without_patterns_every_layer_but_the_head_is_taken(
    tiny_base: Path, source: Path, tmp_path: Path
) -> None:
    assert soppu(tiny_base, "--out", tmp_path / "m", "--source", source).exit_code == 0
    base = models.resolve(str(tiny_base), cache=tmp_path)
    found = calibrate.load(tmp_path / "m", base_hash=base.hash)
    assert len(found) == 8 * 7 and "lm_head" not in found


def test_the_built_in_text_is_the_default(tiny_base: Path, tmp_path: Path) -> None:
    result = soppu(tiny_base, "--out", tmp_path / "m", "--examples", 2, "--modules", "q_proj")
    assert result.exit_code == 0, result.output
    assert "2 examples" in result.stdout and "stdlib-public" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--modules", "nonsense"], "'nonsense' fits no linear layer"),
        (["--source", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(
    tiny_base: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    result = soppu(tiny_base, "--out", tmp_path / "m", *words)
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert last.startswith("Error: ") and said in last and "Traceback" not in result.output
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("words", [["--examples", "0"], ["--max-tokens", "2"]])
def test_numbers_out_of_range_are_usage_errors(tiny_base: Path, tmp_path: Path, words: list[str]) -> None:
    assert soppu(tiny_base, "--out", tmp_path / "m", *words).exit_code == 2
