"""One user out of a bundle: the same as out of all of them, whatever is damaged or missing around."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.compress.bundle import index
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.bundle.users import Users
from soppu.compress.numbers.components import Components
from soppu.errors import BundleError
from tests.soppu.compress import stored
from tests.soppu.compress.handmade import PLANS, make

STORED = ("joint", "joint, thin, float32")


def same(found: Components, wanted: Components, norm: float) -> bool:
    wanted = wanted.select(wanted.gain * norm != 0)
    pairs = [(found.gain, wanted.gain * norm)]
    for one, other in ((found.left, wanted.left), (found.right, wanted.right)):
        pairs += [(getattr(one, name), value) for name, value in vars(other).items()]
    return bool((found.user == 0).all()) and all(torch.equal(a, b) for a, b in pairs)


def assert_the_same(shelf: Shelf, made: Bundle) -> None:
    assert shelf.users == made.users and shelf.base == made.base and shelf.shapes == made.shapes
    assert shelf.worst_error == pytest.approx(max(made.report.relative_error.values()))
    for place, user in enumerate(made.users):
        assert shelf.users.place(user) == place and shelf.cluster(place) == int(made.cluster[place])
        whole, norm = made.of(user), float(made.norm[place])
        for name, part in zip(made.shapes, shelf.components(place), strict=True):
            assert same(part, whole[name], norm) if name in whole else not len(part)
    for name in made.shapes:
        for cluster in range(shelf.clusters):
            for one, other in zip(shelf.matrices(name, cluster), made.matrices(name, cluster), strict=True):
                assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [*PLANS, *STORED])
def test_every_user_of_every_form_is_decoded_alone_as_among_all(plan: str, tmp_path: Path) -> None:
    made = make(PLANS[plan]) if plan in PLANS else stored.bundle(plan)
    assert_the_same(Shelf.of(made), made)
    path = tmp_path / "bundle"
    bundle_id = made.save(path)
    for _ in range(2):  # with an index that is made, and with one that is there
        shelf = Shelf.open(path, expected_hash=bundle_id)
        assert shelf.bundle_id == bundle_id
        assert_the_same(shelf, made)


@settings(max_examples=60)
@given(names=st.lists(st.text(min_size=1, max_size=9), unique=True, max_size=40), other=st.text(max_size=3))
def test_names_are_found_whatever_they_are(names: list[str], other: str) -> None:
    encodable = [name for name in names if name.encode(errors="ignore").decode() == name]
    users = Users.of(encodable)
    assert list(users) == encodable and users == tuple(encodable) and users[1:3] == tuple(encodable[1:3])
    assert [users.place(name) for name in encodable] == list(range(len(encodable)))
    assert [users.index(name) for name in encodable] == list(range(len(encodable)))
    assert (other in users) == (other in encodable) and "\ud800" not in users and 7 not in users


def test_names_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soppu.compress.bundle.users._hash_bytes", len)
    users = Users.of(["ann", "bob", "cemal", "dot"])
    assert [users.place(name) for name in ("ann", "bob", "dot", "cemal", "eve", "x")] == [
        0,
        1,
        3,
        2,
        None,
        None,
    ]


def test_a_survey_says_what_all_users_have() -> None:
    for plan in PLANS.values():
        made = make(plan)
        found = Shelf.of(made).survey
        k_out, k_in = plan.k
        for place, name in enumerate(made.shapes):
            apart, cored, own = 0, False, False
            for user in made.users:
                part = made.of(user).get(name)
                if part is None or not len(part):
                    continue
                few = 2 * len(part) * (k_out + k_in) <= k_out * k_in
                own |= bool(part.own.any())
                if part.own.any() or few:
                    apart = max(apart, len(part))
                else:
                    cored = True
            assert (found.most[place], found.cored[place], found.own[place]) == (apart, cored, own)
            assert (name in found.changed) == (apart > 0 or cored)
    assert Shelf.of(make(PLANS["floats"])).survey.floats and not Shelf.of(make(PLANS["own"])).survey.floats


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle of two pages, opened before."""
    path = tmp_path / "bundle"
    make(PLANS["pages"]).save(path)
    Shelf.open(path)
    return path


def damage(path: Path, page: int) -> None:
    """Another byte in the middle of a page, as a disk may do it: the file is of the same size and time."""
    arrays = index.of(index.StoredFile(path)).arrays
    at, found = int(arrays["begins"][page]) + int(arrays["sizes"][page]) // 2, path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_damaged_page_is_found_where_its_user_asks_and_harms_nobody_else(path: Path) -> None:
    made = Bundle.load(path)
    damage(path, 0)
    shelf = Shelf.open(path)
    for place in (0, 1):
        with pytest.raises(
            BundleError, match=rf"user 'user{place}': page 0: damaged since the file was checked"
        ):
            shelf.components(place)
        with pytest.raises(BundleError, match="page 0: damaged since"):
            shelf.check(place)
    assert len(shelf.components(2)) == len(made.shapes)
    assert shelf.check(2) == range(2, 2 + made.pages[1].users)
    with pytest.raises(BundleError, match="page 0: damaged"):
        _ = shelf.survey


def test_a_page_that_says_what_cannot_be_is_refused_by_user_and_page(tmp_path: Path) -> None:
    made = make(PLANS["own"])
    made.ranks[:] = 1  # the first user has two components
    made.save(tmp_path / "bundle")
    shelf = Shelf.open(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"user 'user0': page 0: q: 2 components of 'user0', allowed: 1"):
        shelf.components(0)
    with pytest.raises(BundleError, match=r"user 'user0': page 0: q: 2 components of 'user0', allowed: 1"):
        shelf.check(0)
    assert len(shelf.components(1)) == 2 and shelf.check(1) == range(1, 2)


def test_a_file_that_changed_is_read_whole_again(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BundleError, match="damaged: content digest"):
        Shelf.open(path)
    made, found = make(PLANS["pages"]), path.stat()
    other = replace(made, norm=made.norm + 1).to_bytes()
    path.write_bytes(other)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_size == found.st_size  # of the same size and time, as an image's files may be
    assert Shelf.open(path).bundle_id == hashlib.sha256(other).hexdigest()
    make(PLANS["both"]).save(path)
    assert Shelf.open(path).shapes == make(PLANS["both"]).shapes
    with pytest.raises(BundleError, match="SHA-256 is .*, expected 000000000000"):
        Shelf.open(path, expected_hash="0" * 64)


def test_an_open_file_that_is_cut_off_says_so(path: Path) -> None:
    shelf = Shelf.open(path)
    path.open("r+b").truncate(600)
    with pytest.raises(BundleError, match=r"user 'user2': page 1: .* the file was cut off"):
        shelf.components(2)


@pytest.mark.parametrize("how", ["a byte", "cut", "empty", "another version", "a folder"])
def test_an_index_that_does_not_fit_is_made_anew(
    path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, place = Bundle.load(path), index.path_of(path)
    data = place.read_bytes()
    if how == "another version":
        monkeypatch.setattr(index, "_VERSION", 2)
    elif how == "a folder":  # so that none can be written, as where a folder is not ours
        place.unlink()
        place.mkdir()
    else:
        changed = {"a byte": data[:99] + bytes([data[99] ^ 1]) + data[100:], "cut": data[:-5], "empty": b""}
        place.write_bytes(changed[how])
    assert_the_same(Shelf.open(path), made)
    assert ("not read" in caplog.text) == (how != "another version")
    assert ("no index can be kept" in caplog.text) == (how == "a folder")
    if how not in ("a folder", "another version"):
        assert place.read_bytes() == data


def test_the_arrays_lie_in_the_mapped_file(path: Path) -> None:
    arrays = index.of(index.StoredFile(path)).arrays
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays.values())
    assert {"names", "ends", "hashes", "places", "norm", "ranks"} <= arrays.keys()
    assert arrays["sums"].dtype == np.uint32
