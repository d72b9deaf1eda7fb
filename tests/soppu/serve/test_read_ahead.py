"""Users who are read before they ask: as many as there is room for, and never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.resident import Residents
from soppu.serve.vllm_plugin.settings import Settings
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine
from tests.soppu.serve.vllm_plugin.commanded import SHARED, begin

A, B = "a" * 64, "b" * 64
USERS = ("alice", "bob", "cleo", "dan")


def until(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold within some seconds."""
    end = time.monotonic() + 30
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def table(read: Callable[[int], int], *, limit: int) -> Residents[int, int]:
    return Residents(read, limit=limit, weigh=lambda value: value)


class Lease:
    """What who uses one holds."""

    def __init__(self, _: int) -> None:
        pass


@pytest.mark.parametrize(("limit", "expected"), [(1000, 6), (60, 5), (25, 2), (11, 1), (0, 0)])
def test_it_ends_before_one_more_would_have_no_room(limit: int, expected: int) -> None:
    made = table(lambda key: 10, limit=limit)
    made.read_ahead(range(6), lambda: True).join(30)
    figures = made.figures()
    assert (figures.count, figures.reads, figures.evictions) == (expected, expected, 0)
    for key in range(expected):
        made.take(key, Lease)
    assert made.figures().reads == expected


def test_one_that_cannot_be_read_keeps_no_other_away_and_is_told_to_who_asks() -> None:
    def read(key: int) -> int:
        if key == 2:
            raise ValueError("page 2 is damaged")
        return 10

    made = table(read, limit=1000)
    made.read_ahead(range(5), lambda: True).join(30)
    assert sorted(made.values()) == [0, 1, 3, 4] and made.figures().failures == 1
    with pytest.raises(ValueError, match="damaged"):
        made.take(2, Lease)


def test_it_waits_while_somebody_waits() -> None:
    begun, go = list[int](), threading.Event()

    def read(key: int) -> int:
        begun.append(key)
        if key == 99:
            go.wait(30)
        return 1

    made = table(read, limit=1000)
    asked = threading.Thread(target=lambda: made.take(99, Lease))
    asked.start()
    assert until(lambda: begun == [99])
    ahead = made.read_ahead(range(3), lambda: True)
    time.sleep(0.3)
    assert begun == [99]
    go.set()
    ahead.join(30)
    asked.join(30)
    assert begun == [99, 0, 1, 2]


def test_it_ends_where_nobody_wants_the_rest() -> None:
    begun = list[int]()
    made = table(lambda key: begun.append(key) or 1, limit=1000)
    made.read_ahead(range(100), lambda: len(begun) < 3).join(30)
    assert sorted(made.values()) == [0, 1, 2]


def test_bundles_that_are_there_and_those_that_come_are_read_and_what_is_dropped_is_not() -> None:
    torch.set_num_threads(1)
    model = tiny.llama()
    first, second = (
        tiny.bundle({user: tiny.lora(model, seed=seed + 10 * number) for seed, user in enumerate(users, 1)})
        for number, users in enumerate((USERS, USERS[:2]))
    )
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(first, bundle_id=A)
    bank.activate(A)
    assert bank.figures().reads == 0
    bank.read_ahead()
    assert until(lambda: bank.figures().count == 4)
    bank.stage(second, bundle_id=B)
    assert until(lambda: bank.figures().count == 6)
    bank.resolve("alice")
    assert bank.figures().reads == 6
    bank.drop(B)
    assert bank.figures().count == 4


@pytest.mark.parametrize("wanted", [True, False])
def test_a_worker_of_vllm_reads_ahead_once_the_server_is_connected(tmp_path: Path, wanted: bool) -> None:
    path = tmp_path / "first.soppu"
    handmade.bundle(engine.SHAPES, {user: [SHARED] for user in USERS}).save(path)
    server = begin(Settings(path, tmp_path / "state", read_ahead=wanted))
    try:
        found = server.worker.step.table
        assert until(lambda: found.figures().count == 4) if wanted else found.figures().reads == 0
    finally:
        server.control.close()
