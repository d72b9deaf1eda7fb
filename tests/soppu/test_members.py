"""The table of nodes and their users: what it holds, and what is refused in it by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from soppu.errors import ConfigError
from soppu.federation import members


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    known = {2**64 - 1: "alice", 7: "bob.b-2", 12345678901234567890: "carol_c"}
    members.write(tmp_path / "below" / "members.toml", known)
    assert members.read(tmp_path / "below" / "members.toml") == known


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no table"),
        ("members = 3", "no table"),
        ("[members]\nalice = 'alice'", "'alice' = 'alice'"),
        ("[members]\n'-1' = 'alice'", "'-1' = 'alice'"),
        ("[members]\n'0' = 'alice'", "'0' = 'alice'"),
        ("[members]\n'²' = 'alice'", "'²' = 'alice'"),
        (f"[members]\n'{2**64}' = 'alice'", "18446744073709551616"),
        ("[members]\n1 = 'alice'\n2 = 'alice'", "'alice' has two nodes"),
        ("[members]\n1 = 7", "user id"),
        ("[members]\n1 = ''", "user id ''"),
        ("[members]\n1 = '../alice'", "user id '../alice'"),
        ("[members]\n1 = 'a'\n1 = 'b'", "cannot be read"),
        ("[members", "cannot be read"),
    ],
)
def test_what_is_no_table_of_members_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "members.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=why) as caught:
        members.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="soppu federation register"):
        members.read(tmp_path / "members.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        members.read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"[members]\n1 = '\xff'")
    with pytest.raises(ConfigError, match="cannot be read"):
        members.read(tmp_path / "bytes")
