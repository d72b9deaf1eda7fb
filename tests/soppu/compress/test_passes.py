"""Passes over a fleet: what is read, how often, what is kept, and memory that goes back when it is freed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from soppu.adapter import LoraAdapter
from soppu.compress import CompressOptions, compress
from soppu.compress.fleet import passes
from soppu.compress.fleet import survey as fleets
from soppu.compress.fleet.passes import Passes
from soppu.compress.linalg.canonical import Canonical
from soppu.compress.linalg.sketch import Steps
from tests.soppu.compress.large_fit import alone

Make = Callable[..., dict[str, LoraAdapter]]
SHAPES = {"q": (20, 16), "v": (12, 30)}


class Counted(Mapping[str, LoraAdapter]):
    """Counts how often each adapter is asked for."""

    def __init__(self, held: Mapping[str, LoraAdapter]) -> None:
        self.held, self.asked = held, dict.fromkeys(held, 0)

    def __getitem__(self, user: str) -> LoraAdapter:
        self.asked[user] += 1
        return self.held[user]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_MOST_USERS", 2)


def over(held: Mapping[str, LoraAdapter], **room: int) -> Passes:
    return Passes(fleets.survey(held, device=torch.device("cpu")), {}, **room)


def form_bytes(one: Passes) -> int:
    batch = next(iter(one.fleet.batches()))
    return sum(one.form(batch, name).nbytes for name in SHAPES)


class Users:
    """A pass that counts."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def add(self, batch: Canonical) -> None:
        self.seen.append(len(batch.s))


def counting(*asked: int) -> Steps[list[list[int]]]:
    found = []
    for every in asked:
        one = Users()
        yield one, every
        found.append(one.seen)
    return found


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("kept", "reads"), [(0, [4] * 6), (1, [2, 2, 4, 4, 4, 4]), (3, [2] * 6)])
def test_what_there_is_room_for_is_read_once_and_the_rest_in_every_pass(fleet: Make, kept, reads):
    held = Counted(fleet((3, 3, 3, 3, 3, 3), shapes=SHAPES))
    room = kept * form_bytes(over(held.held))
    searched = over(held, room=room)
    for _ in range(3):
        assert [name for name, _ in searched.each(lambda *_: None, note="")] == ["q", "v"] * 3
    assert list(held.asked.values()) == reads  # one of them by the survey


@pytest.mark.usefixtures("small_batches")
def test_searches_share_passes_and_read_no_batch_that_none_of_them_wants(fleet: Make):
    held = Counted(fleet((3,) * 7, shapes=SHAPES))
    told: list[str] = []
    searched = over(held, room=0)
    found = searched.run(
        {"q": counting(1, 2), "v": counting(2)}, lambda what, done, total: told.append(what), note="look"
    )
    assert found == {"q": [[2, 2, 2, 1], [2, 2]], "v": [[2, 2]]}
    assert list(held.asked.values()) == [3, 3, 2, 2, 3, 3, 2]
    assert told == ["look, pass 1"] * 4 + ["look, pass 2"] * 4


def test_a_search_that_needs_no_pass_has_its_result():
    assert alone(counting(), lambda: iter(())) == []


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("method", ["residual", "joint", "cluster", "joint-diag"])
def test_what_is_kept_does_not_change_the_bundle(fleet: Make, method, monkeypatch):
    held = fleet((3, 2, 3, 3, 1), shapes=SHAPES)
    clusters, most = 2 if method == "cluster" else 1, 0.3 if method == "residual" else 0.0
    options = CompressOptions(method=method, rank=3, clusters=clusters, max_error=most)
    kept = compress(held, options).to_bytes()
    monkeypatch.setattr(passes, "ROOM", 0)
    assert compress(held, options).to_bytes() == kept


@pytest.mark.parametrize("method", ["residual", "joint", "ternary"])
def test_the_adapters_given_stay_as_they_are(fleet: Make, method):
    held = fleet((3, 2, 3), shapes=SHAPES)
    before = {user: one.content_hash() for user, one in held.items()}
    compress(held, CompressOptions(method=method, rank=3, max_error=0.3 if method == "residual" else 0.0))
    assert {user: one.content_hash() for user, one in held.items()} == before


# a process of its own: what a long test run has freed before would be used first, and fill the holes
_MEASURE = """
from pathlib import Path
import torch
from soppu.compress.fleet.survey import trim_heap

BLOCKS, SIZE = 800, 1 << 16  # bytes: below what is ever a mapping of its own


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


large, small = [], []
for _ in range(BLOCKS):
    large.append(torch.ones(SIZE // 4))
    small.append(torch.ones(16))
held = resident()
large.clear()
trim_heap()
assert all(float(one.sum()) == 16 for one in small)
print((held - resident()) / (BLOCKS * SIZE))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident size is read from /proc")
def test_freed_memory_between_small_blocks_that_stay_is_given_back():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.8
