"""What a name with "@" asks for: one rule for the bank, the vLLM plugin's directory and the targets."""

from __future__ import annotations

import pytest

from soppu.serve.names import find_version, split_version

BUNDLES = ("aa11", "aa22", "bb33")


@pytest.mark.parametrize(
    ("name", "user", "prefix", "bundles"),
    [
        ("alice", "alice", "", []),
        ("alice@", "alice@", "", []),  # nothing is asked for, so not "every bundle"
        ("alice@bb", "alice", "bb", ["bb33"]),
        ("alice@aa", "alice", "aa", ["aa11", "aa22"]),
        ("alice@zz", "alice", "zz", []),
        ("a@b@aa11", "a@b", "aa11", ["aa11"]),  # the last "@" counts
        ("@aa11", "", "aa11", ["aa11"]),
        ("", "", "", []),
    ],
)
def test_a_name_is_a_user_and_the_bundles_it_may_mean(
    name: str, user: str, prefix: str, bundles: list[str]
) -> None:
    assert split_version(name) == (user, prefix)
    assert find_version(name, BUNDLES) == (user, prefix, bundles)
