"""The shipped configurations: all load, and default.toml is the truth about the defaults."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from soppu import config as configuration
from soppu.compress.options import CompressOptions
from soppu.config import Config

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.toml"))
DEFAULT = FOLDER / "default.toml"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_there_are_as_many_as_we_know() -> None:
    assert [path.name for path in FILES] == [
        "basis.toml",
        "compose.toml",
        "default.toml",
        "demo.toml",
        "lorax.toml",
        "nightly.toml",
        "tiny.toml",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_configuration_loads(path: Path) -> None:
    config = configuration.load(path)
    assert configuration.from_dict(tomllib.loads(configuration.dump(config))) == config


@pytest.mark.parametrize("path", [path for path in FILES if path != DEFAULT], ids=lambda path: path.stem)
def test_the_others_say_something_the_defaults_do_not(path: Path) -> None:
    assert flat(tomllib.loads(path.read_text()))


def test_default_lists_every_key_with_exactly_its_default() -> None:
    listed = flat(tomllib.loads(DEFAULT.read_text()))
    known = flat(configuration.to_dict(Config()))
    assert listed.keys() == known.keys()
    assert {name: (type(v), v) for name, v in listed.items()} == {
        name: (type(v), v) for name, v in known.items()
    }
    assert list(listed) == list(known)  # in the order of the code, so that the two can be read side by side


def test_every_key_of_default_says_what_it_means() -> None:
    for number, line in enumerate(DEFAULT.read_text().splitlines(), start=1):
        if re.match(r"\s*[a-z_]+ = ", line):
            assert re.search(r" # \S", line), f"default.toml:{number} has no comment: {line}"


def test_every_choice_is_named_where_it_is_made() -> None:
    """A key with a fixed list of values names each of them in its comment."""
    lines: dict[str, str] = {}
    section = last = ""
    for line in DEFAULT.read_text().splitlines():
        if match := re.match(r"\[(\w+)\]", line):
            section = match[1] + "."
        elif match := re.match(r"(\w+) = ", line):
            last = section + match[1]
            lines[last] = line
        elif re.match(r"\s+# ", line):  # a comment that goes on
            lines[last] += line
    checked = 0
    for section_field in dataclasses.fields(Config):
        owner = getattr(Config(), section_field.name)
        fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else [section_field]
        prefix = f"{section_field.name}." if dataclasses.is_dataclass(owner) else ""
        for field in fields:
            kind = get_type_hints(type(owner) if prefix else Config)[field.name]
            for value in map(str, get_args(kind) if get_origin(kind) is Literal else ()):
                assert value in lines[prefix + field.name], f"{prefix}{field.name}: {value} is not mentioned"
                checked += 1
    assert checked >= 6


def test_the_targets_of_the_shipped_files_are_those_their_comments_speak_of() -> None:
    targets = {path.stem: str(CompressOptions.of(configuration.load(path).compress).target) for path in FILES}
    assert targets.pop("compose") == "16x"
    assert targets.pop("basis") == ""
    assert targets == {"default": "16x", "demo": "16x", "lorax": "", "nightly": "16x", "tiny": "4x"}
