"""Names as ids: reversible, no two names one id unseen, what could not be shown is refused."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu import user_ids
from soppu.errors import DataError
from soppu.files import is_name
from soppu.registry import check_user_id
from soppu.serve.names import header_value, split_version


@pytest.mark.parametrize(
    ("name", "user_id"),
    [
        ("alice", "alice"),
        ("xml_etree.2-b", "xml_etree.2-b"),
        ("alice@example.com", "alice%40example.com"),
        ("a b/c\\d", "a%20b%2Fc%5Cd"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E."),
        ("50%", "50%25"),
        ("100%41", "100%2541"),  # no escape of ours: A needs none
        ("a%4", "a%254"),
        ("%c3%a9", "%25c3%25a9"),
        ("zoë", "zo%C3%AB"),
        ("٣", "%D9%A3"),
        ("~root", "%7Eroot"),
        ("+49 30 1234", "%2B49%2030%201234"),
    ],
)
def test_names_and_their_ids(name: str, user_id: str) -> None:
    assert user_ids.to_id(name) == user_id == check_user_id(user_id)
    assert user_ids.name_of(user_id) == name


@given(
    st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1, max_size=10).filter(
        str.strip
    )
)
def test_an_id_is_a_folder_a_header_and_no_version_and_reads_back(name: str) -> None:
    user_id = user_ids.to_id(name)
    assert is_name(user_id) and not user_id.startswith(".")
    assert header_value(user_id) == user_id and split_version(user_id) == (user_id, "")
    assert user_ids.to_id(user_id) == user_id == check_user_id(user_id)
    assert user_ids.name_of(user_id) == unicodedata.normalize("NFC", name)


@given(st.text(max_size=12), st.text(max_size=12))
def test_two_names_have_two_ids_unless_one_is_the_others_id(one: str, two: str) -> None:
    try:
        ids = user_ids.to_id(one), user_ids.to_id(two)
    except DataError:
        return
    names = {unicodedata.normalize("NFC", user_ids.name_of(name)) for name in (one, two)}
    assert (ids[0] == ids[1]) == (len(names) == 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'' is empty"),
        ("  ", "'  ' is empty"),
        ("a" * 129, "129 characters as an id"),
        ("é" * 30, "180 characters as an id"),
        ("a\nb", r"U\+000A \(a control character\) at 1"),
        ("a\x00", r"U\+0000"),
        ("ab\u200b", r"U\+200B \(ZERO WIDTH SPACE\) at 2"),
        ("\ud800", r"U\+D800"),
        ("a\u2028b", r"U\+2028 \(LINE SEPARATOR\)"),
    ],
)
def test_what_can_be_no_name_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        user_ids.to_id(name)
    assert not user_ids.is_id(name)
