"""docs/data.md: every example of the page is written to disk, and gives the users it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from soppu import config as configuration
from soppu import data, user_ids
from soppu.errors import DataError

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
_PARTS = re.split(r"<!-- source: (\S+) -->\n", PAGE)[1:]
EXAMPLES = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))
_FENCE = r"```{}\n(.*?)```"


def test_there_are_as_many_as_we_know() -> None:
    assert len(EXAMPLES) == 7
    assert PAGE.count("Gives `") == len(EXAMPLES)


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_of_the_page_is_read_as_it_says(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = EXAMPLES[source].split("Gives ", 1)
    for name, content in re.findall(r"`(\S+)`:\n\n" + _FENCE.format(r"\w+"), text, re.S):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    for program in re.findall(_FENCE.format("python"), text, re.S):
        exec(program, {})
    given = {"source": source, "min_examples": 1, "on_small_user": "leave-out"}
    for table in re.findall(_FENCE.format("toml"), text, re.S):
        given |= tomllib.loads(table)
    config = configuration.from_dict({"data": given}).data
    wanted = {user: int(count) for user, count in re.findall(r"`(\S+)` (\d+)", said.split(".\n")[0])}
    assert data.list_users(config) == sorted(wanted)
    for user, count in wanted.items():
        if count == 1:  # all of it is held out
            with pytest.raises(DataError, match=f"{user_ids.name_of(user)}.* has 0 examples"):
                data.load_user(config, user)
        else:
            found = data.load_user(config, user)
            assert len(found.examples) == count
