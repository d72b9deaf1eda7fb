"""Rows that are read when they are first in a batch, within a bound; a real worker and control, no engine."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from soppu.compress.bundle import index
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.errors import BundleError
from soppu.serve.layers import kernels, native
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.frontend.figures import Residency
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.static import Limits
from soppu.serve.vllm_plugin.worker.worker import Worker
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine

SHARED = ("shared", "axis", "shared")
FORMS: list[handmade.Plan] = [
    [SHARED],
    [("own", "own"), SHARED, ("shared",)],
    [("both", "left", "right"), ()],
    [("own",), None, ("right",)],
    [()],
]
USERS = {f"user{number}": FORMS[number % len(FORMS)] for number in range(12)}
FORM = Form(torch.float32, torch.device("cpu"), spare=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    handmade.bundle(engine.SHAPES, USERS, clusters=[n % 2 for n in range(12)]).save(path)
    return path


@pytest.fixture(params=["plain", "native", "static"])
def how(request: pytest.FixtureRequest) -> kernels.Kernel | Limits:
    if request.param == "native" and (why := native.load()):
        pytest.skip(f"no compiled kernel: {why}")
    made = {"plain": kernels.plain, "native": kernels.native}
    return made.get(request.param) or Limits(tokens=64, requests=8, bases=4)


def worker_of(path: Path, how: kernels.Kernel | Limits, *, limit: int = 0) -> Worker:
    return Worker(engine.linears(), how, FORM, bundles=[Shelf.open(path)], limit=limit)


def assert_served(worker: Worker, made: Bundle, batch: list[int]) -> None:
    """A batch of rows, 0 the base model, one to three tokens each."""
    counts = [1 + number % 3 for number in range(len(batch))]
    worker.step.begin(np.array(batch), np.array(counts))
    users = [made.users[row - 1] if row else None for row in batch]
    tokens = [user for user, count in zip(users, counts, strict=True) for _ in range(count)]
    for number, linear in enumerate(worker.step.linears):
        x = torch.randn(len(tokens), engine.INPUTS[linear.name])
        y = torch.zeros(len(x), linear.out)
        worker.step.apply(x, y, number)
        wanted = engine.expected(made, tokens, linear.name, x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("limit", [0, 12_000, 1 << 30])
def test_batches_are_right_while_rows_come_and_go(
    path: Path, how: kernels.Kernel | Limits, limit: int
) -> None:
    worker, made, rng = worker_of(path, how, limit=limit), Bundle.load(path), random.Random(limit)
    for _ in range(20):
        assert_served(worker, made, rng.choices(range(13), k=rng.randint(1, 7)))
    figures = worker.step.table.figures()
    assert (figures.evictions > 0) == (limit < 1 << 30) == (figures.reads > 12)
    in_use = {row for row in worker.step._rows.tolist() if row}
    assert figures.used == len(in_use) <= figures.count
    idle = {key[1] + 1 for key in worker.step.table.values()} - in_use
    assert figures.weight <= limit or not idle


def test_a_row_stays_for_as_long_as_it_is_in_the_batch(path: Path) -> None:
    worker, made = worker_of(path, kernels.plain), Bundle.load(path)
    assert_served(worker, made, [3])
    (held,) = worker.step.table.values().values()
    for others in ([4, 5], [6, 3, 7], [8, 9, 10]):
        assert_served(worker, made, [3, *others])
        assert worker.step.table.values()[1, 2] is held
    assert_served(worker, made, [4, 5])
    assert_served(worker, made, [6])
    assert (1, 2) not in worker.step.table
    assert_served(worker, made, [3])
    worker.step.clear()
    assert worker.step.table.figures().used == 0


def test_a_worker_starts_without_reading_a_page_where_nothing_is_recorded(path: Path) -> None:
    made = Bundle.load(path)
    Shelf.open(path)
    damage(path, range(len(made.pages)))
    worker = worker_of(path, kernels.plain)
    assert worker.step.table.figures().reads == 0
    with pytest.raises(BundleError, match=r"user 'user2': page 1: damaged since the file was checked"):
        worker.step.begin(np.array([3]), np.array([1]))


def damage(path: Path, pages: range) -> None:
    """A byte of each page, the file's time as before."""
    found, arrays = path.stat(), index.of(index.StoredFile(path)).arrays
    with path.open("r+b") as file:
        for page in pages:
            file.seek(int(arrays["begins"][page]) + 75)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 32]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.fixture
def served(path: Path) -> Iterator[tuple[Control, Worker]]:
    worker = worker_of(path, kernels.plain)
    control = Control(Settings(path, path.parent / "state"), base_hash=tiny.BASE_HASH)
    control.connect(Engine(lambda name, *args: [getattr(worker, name)(*args)], set))
    yield control, worker
    control.close()


def test_a_damaged_page_is_found_before_its_user_is_let_into_the_engine(
    served: tuple[Control, Worker], path: Path
) -> None:
    control, worker = served
    made = Bundle.load(path)
    damage(path, range(1, 2))
    for user in ("user2", "user3"):
        for _ in range(2):  # asked for again, it is looked at again
            assert control.unchecked(user)
            with pytest.raises(BundleError, match=rf"user '{user}': page 1: damaged since"):
                control.check_user(user)
    for user in ("user1", f"user4@{control.bank.active[:9]}"):
        control.check_user(user)
        assert not control.unchecked(user)
    assert not control.unchecked("nobody") and not control.unchecked("")
    assert_served(worker, made, [2, 0, 5])
    damage(path, range(1, 2))
    control.check_user("user2")
    assert_served(worker, made, [2, 3, 5])


def test_figures_are_those_of_the_workers_at_the_scrape_before(
    served: tuple[Control, Worker], path: Path
) -> None:
    control, worker = served
    registry = CollectorRegistry()
    registry.register(Residency(control))
    assert_served(worker, Bundle.load(path), [1, 2, 1])
    figures = control.figures()
    assert (figures.count, figures.used, figures.reads, figures.limit) == (2, 2, 2, 0)
    text, deadline = "", 200
    while 'soppu_resident_users{state="in_use"} 2.0' not in text and deadline:
        text, deadline = generate_latest(registry).decode(), deadline - 1
    for line in (
        f'soppu_bundle_users{{active="true",bundle="{control.bank.active[:12]}"}} 12.0',
        "soppu_resident_uses_total 2.0",
        'soppu_resident_reads_total{outcome="success"} 2.0',
        "soppu_resident_limit_bytes 0.0",
        f"soppu_resident_bytes {float(figures.weight)}",
    ):
        assert line in text
