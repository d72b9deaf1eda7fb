"""When two names and hashes are one base model, and what a refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu.base_identity import Base, check, same
from soppu.errors import AdapterError, BundleError

HASH, OTHER = "b" * 64, "c" * 64
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("org/Name", "org/Name/"),
        ("org/Name", "ORG/name"),
        ("org/Name", "/models/Name"),
        ("org/Name", "~/models/name//"),
        ("org/Name", f"/root/.cache/huggingface/hub/models--org--Name/snapshots/{SHA}/"),
        ("/a/Name", "/b/Name"),
        ("./Name", "Name"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2", f"hub/models--gpt2/snapshots/{SHA}"),
        ("C:\\models\\Name", "org/Name"),
        ("smollm2-135m", "/data/.soppu/models/smollm2-135m"),
        ("/runs/7/final", "/runs/7/final/"),
    ],
)
def test_names_of_one_model(a: str, b: str) -> None:
    assert same(Base(a), Base(b)) and same(Base(b), Base(a))
    assert same(Base(a, HASH), Base(b)) and same(Base(a), Base(b, HASH))
    assert not same(Base(a, HASH), Base(b, OTHER))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("org/Name", "org/Name-Instruct"),
        ("org/Name", "else/Name"),
        ("org/Name", f"hub/models--else--Name/snapshots/{SHA}"),
        ("/a/final", "/b/final"),
        ("/a/checkpoint-100", "/b/checkpoint-100"),
        ("/a/model", "model"),
        (f"/a/{SHA}", f"/b/{SHA}"),
        ("org/Name", ""),
    ],
)
def test_names_that_do_not_say_they_are_one_model(a: str, b: str) -> None:
    assert not same(Base(a), Base(b)) and not same(Base(b), Base(a))
    assert same(Base(a, HASH), Base(b, HASH))  # hashes decide


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_rule_is_symmetric_and_every_name_is_its_own(a: str, b: str) -> None:
    assert same(Base(a), Base(b)) == same(Base(b), Base(a))
    assert same(Base(a), Base(a))


def test_a_refusal_says_both_and_a_cure_where_a_hash_is_missing() -> None:
    with pytest.raises(
        AdapterError,
        match=r"ann: made for base model unknown \(no name\), this server has b{12} \(org/Name\); .*--base",
    ):
        check(Base(), Base("org/Name", HASH), who="ann", whose="this server has")
    with pytest.raises(BundleError) as refused:
        check(Base("x", OTHER), Base("x", HASH), who="bundle", whose="this server has", error=BundleError)
    assert "--base" not in str(refused.value)  # another model, and nothing makes it this one
    check(Base(), Base(), who="ann", whose="bob for")


def test_what_two_know_is_joined() -> None:
    assert Base("n").joined(Base("m", HASH)) == Base("n", HASH)
    assert Base("", HASH).joined(Base("m", "")) == Base("m", HASH)
