"""Users of a bundle who are not all in memory: the texts are those of a bank where all are."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Made
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, rule

from soppu.compress.bundle import index
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.errors import RequestError
from soppu.models import linear_shapes
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank import from_bundle, one_user
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.resident import Residents
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.layers.deltas import Layers
from soppu.serve.layers.factors import BundleSlot
from soppu.serve.layers.joined import Joined
from soppu.serve.layers.records import unpack
from soppu.serve.layers.routing import Routing
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.handmade import KINDS, Sizes

SHAPES = {"first": (9, 7), "second": (6, 7), "third": (9, 7)}
KINDS_OF = st.lists(st.sampled_from(sorted(KINDS)), max_size=4)
PLANS = st.lists(st.none() | KINDS_OF, min_size=3, max_size=3).filter(lambda plan: plan != [None] * 3)
PROMPT = "the quick"
A = "a" * 64
USERS: dict[str, handmade.Plan] = {
    "alice": [["shared", "shared"]],
    "bob": [["own", "own", "own"]],
    "carol": [["shared", "own"], ["shared"], ["left", "right"]],
    "dora": [["axis", "axis"], None, []],
    "emil": [["both"], [], None],
    "fay": [["shared"] * 5, ["right"], ["axis"]],
    "gus": [[]],
}


@settings(max_examples=40, deadline=None)
@given(
    users=st.lists(PLANS, min_size=1, max_size=5),
    clusters=st.lists(st.integers(0, 1), min_size=5, max_size=5),
    batches=st.lists(st.lists(st.integers(-1, 4), min_size=1, max_size=7), min_size=1, max_size=3),
    kernel=st.booleans(),
)
def test_any_batch_gets_the_change_that_is_meant(
    users: list[handmade.Plan], clusters: list[int], batches: list[list[int]], kernel: bool
) -> None:
    named = {f"user{n}": plan for n, plan in enumerate(users)}
    sizes = Sizes(k_out=4, k_in=5, page=2)
    made = handmade.bundle(SHAPES, named, clusters=clusters[: len(users)], sizes=sizes, seed=len(users))
    shelf = Shelf.of(made)
    frame = from_bundle.frame(shelf, cast=lambda _, tensor: tensor.float() if kernel else tensor.double())
    slots = [_slot(shelf, frame, place) for place in range(len(users))]
    layers = Layers(tuple(SHAPES), tuple(o for o, _ in SHAPES.values()))
    for batch in batches:  # one after the other: what is joined stays
        rows = [number if number < len(users) else -1 for number in batch]
        x = torch.randn(2 * len(rows), 7, dtype=torch.float32 if kernel else torch.float64)
        y = torch.zeros(len(x), sum(layers.widths), dtype=x.dtype)
        Routing([slots[number] if number >= 0 else None for number in rows]).apply(layers, x, y)
        for row, number in enumerate(rows):
            for place, name in enumerate(SHAPES):
                mine = slice(2 * row, 2 * row + 2)
                if number < 0:
                    assert not y[mine].any()
                    continue
                wanted = x[mine].double() @ handmade.meaning(made, f"user{number}", name).T
                got = y[mine, layers.columns(place)].double()
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def _slot(shelf: Shelf, frame: from_bundle.Frame, place: int) -> BundleSlot:
    user = one_user.read(shelf, place, from_bundle.Reading(thin=frame.reads_records))
    return BundleSlot(frame, place, user.cluster, frame.numbers(user.cores, user.record))


def test_records_are_copied_once_and_tables_given_before_stay_right() -> None:
    made = handmade.bundle(SHAPES, USERS, sizes=Sizes(page=3))
    shelf = Shelf.of(made)
    held = [one_user.read(shelf, place, from_bundle.Reading()).record for place in range(len(USERS))]
    joined, rng, before = Joined(), random.Random(0), []
    for _ in range(60):
        chosen = rng.sample(held, rng.randint(1, 4))
        before.append((chosen, *joined.of(chosen)))
    for chosen, table, places in before:
        assert len(set(places)) == len(places) == len(table.starts) - 1
        for record, place in zip(chosen, places, strict=True):
            for module in range(len(SHAPES)):
                one, other = unpack(record, 0, module), unpack(table, place, module)
                assert (one is None) == (other is None)
                assert (
                    one is None
                    or other is None
                    or torch.equal(one.p, other.p)
                    and torch.equal(one.b, other.b)
                )
    tensors = {id(table.data): table.data for _, table, _ in before}
    assert 1 < len(tensors) < 20


class Bounded(RuleBasedStateMachine):
    """A table of weights against what it promises: whoever is in use stays, the others within the bound."""

    leases = Made("leases")
    LIMIT = 12

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []
        self.table: Residents[int, list[int]] = Residents(
            self._read, limit=self.LIMIT, weigh=lambda v: v[0] % 7
        )
        self.held: dict[int, int] = {}

    def _read(self, key: int) -> list[int]:
        self.reads.append(key)
        if key == 13:
            raise RequestError("unlucky", status=424, error_type="generation")
        return [key]

    @rule(target=leases, key=st.integers(0, 20).filter(lambda key: key != 13))
    def take(self, key: int) -> Any:
        there = key in self.table
        count = len(self.reads)
        lease = self.table.take(key, _Lease)
        assert lease.value == [key] and len(self.reads) == count + (not there)
        values = self.table.values()
        idle = sum(other % 7 for other in values if other != key and not self.held.get(other))
        assert key in values and (self.table.figures().weight <= self.LIMIT or idle == 0)
        self.held[key] = self.held.get(key, 0) + 1
        return [lease, key]

    @rule(lease=consumes(leases))
    def give_back(self, lease: list[Any]) -> None:
        self.held[lease[1]] -= 1
        lease.clear()

    @rule(keys=st.lists(st.integers(0, 12), unique=True, max_size=5))
    def take_some_together(self, keys: list[int]) -> None:
        count, new = len(self.reads), sum(key not in self.table for key in keys)
        taken = self.table.take_all(keys, _Lease)
        assert [lease.value for lease in taken] == [[key] for key in keys]
        assert len(self.reads) == count + new and set(keys) <= self.table.values().keys()
        assert self.table.figures().used == len({*keys, *(key for key, held in self.held.items() if held)})
        del taken

    @rule()
    def a_failure_is_kept_nowhere(self) -> None:
        with pytest.raises(RequestError, match="unlucky"):
            self.table.take(13, _Lease)
        assert 13 not in self.table

    @rule()
    def trim(self) -> None:
        self.table.trim()
        idle = [key for key in self.table.values() if not self.held.get(key) and key % 7]
        assert self.table.figures().weight <= self.LIMIT or not idle

    @rule(odd=st.booleans())
    def forget(self, odd: bool) -> None:
        self.table.forget(lambda key: key % 2 == odd and not self.held.get(key))

    @invariant()
    def bound(self) -> None:
        figures, values = self.table.figures(), self.table.values()
        used = {key for key, count in self.held.items() if count}
        assert used <= values.keys() and figures.used == len(used) and figures.count == len(values)
        assert figures.weight == sum(key % 7 for key in values)
        assert figures.reads == len(self.reads) and figures.failures == self.reads.count(13)


class _Lease:
    def __init__(self, value: list[int]) -> None:
        self.value = value


TestBounded = Bounded.TestCase
TestBounded.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.fixture(scope="module")
def made() -> Bundle:
    torch.set_num_threads(1)
    bundle = handmade.bundle(linear_shapes(tiny.llama()), USERS, clusters=[0, 1, 1, 0, 1, 0, 0])
    return replace(bundle, norm=bundle.norm / 8)


@pytest.fixture(scope="module")
def expected(made: Bundle) -> dict[str, str]:
    """Texts with all users in memory, as `from_bundle.read` lays them out."""
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=A)
    modules = from_bundle.read(made, cast=lambda _, tensor: tensor)
    texts = {}
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(prefix_tokens=0)) as engine:
        for place, user in enumerate(made.users):
            slot = BundleSlot(modules, place, int(made.cluster[place]))
            generation = engine._prepare(GenerationRequest(PROMPT, "", max_new_tokens=6), None)
            generation.job = replace(generation.job, resolved=replace(generation.job.resolved, where=slot))
            with engine._condition:
                engine._waiting.append(generation)
                engine._condition.notify_all()
            texts[user] = generation.result()[1].text
    assert len(set(texts.values())) >= 5
    return texts


@pytest.mark.parametrize("limit", [0, 16_000, 1 << 30])
def test_texts_are_the_same_while_users_come_and_go(
    made: Bundle, expected: dict[str, str], limit: int
) -> None:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, resident=limit)
    bank.stage(made, bundle_id=A)
    bank.activate(A)
    jobs = random.Random(0).choices(list(USERS), k=42)
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=4)) as engine:

        def ask(user: str) -> str:
            return engine.submit(GenerationRequest(PROMPT, user, max_new_tokens=6)).result()[1].text

        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(ask, jobs)) == [expected[user] for user in jobs]
    figures = bank.figures()
    assert figures.uses == len(jobs)
    if limit == 1 << 30:
        assert (figures.reads, figures.evictions, figures.count) == (len(USERS), 0, len(USERS))
    else:
        assert figures.reads > len(USERS) and figures.evictions > 0
        bank.resolve("alice")
        assert bank.figures().weight <= max(limit, 12_000)


def test_many_who_ask_for_new_users_at_once_have_each_decoded_once(made: Bundle) -> None:
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=A)
    asked = [f"{user}@{A}" for user in USERS] * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(bank.resolve, asked))
    assert bank.figures().reads == len(USERS)
    assert len({id(resolved.where) for resolved in found}) == len(USERS)
    assert [resolved.adapter_id for resolved in found] == asked


def test_a_dropped_version_is_let_go_and_finished_on(made: Bundle) -> None:
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    bank.stage(made, bundle_id=A)
    held, slot = bank.resolve(f"bob@{A}"), bank.resolve(f"alice@{A}").where
    bank.drop(A)
    assert bank.figures().count == 0 and bank.figures().weight == 0
    bank.stage(made, bundle_id=A)
    assert bank.resolve(f"alice@{A}").where is not slot and isinstance(held.where, BundleSlot)


@pytest.fixture
def stored(made: Bundle, tmp_path: Path) -> Path:
    """A bundle file that was opened before."""
    path = tmp_path / "users.soppu"
    made.save(path)
    Shelf.open(path)
    return path


def test_a_start_takes_the_file_over_once_and_reads_no_page(
    stored: Path, made: Bundle, tmp_path: Path
) -> None:
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    state = ServerState.open(tmp_path / "state", bank)
    bundle_id = state.add_file(stored)
    assert state.add_file(stored) == bundle_id and list(bank.bundles()) == [bundle_id]
    state.activate(bundle_id)
    (path,) = (tmp_path / "state" / "bundles").glob("*.safetensors")
    state.close()
    inode, found = path.stat().st_ino, path.stat()
    pages = index.of(index.StoredFile(path)).arrays["begins"]
    with path.open("r+b") as file:  # nothing of a page is looked at until somebody asks
        file.seek(int(pages[0]))
        file.write(bytes(found.st_size - int(pages[0])))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    again = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH)
    state = ServerState.open(tmp_path / "state", again)
    assert state.add_file(stored) == bundle_id and path.stat().st_ino == inode
    assert again.bundles() == {bundle_id: made.users} and again.figures().reads == 0
    with pytest.raises(RequestError, match=r"user 'alice': page 0: damaged since the file was checked"):
        again.resolve("alice")
    state.close()


def test_a_bundle_may_come_through_a_pipe(stored: Path, made: Bundle, tmp_path: Path) -> None:
    bank, pipe = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH), tmp_path / "pipe"
    state = ServerState.open(tmp_path / "state", bank)
    for _ in range(2):
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        with ThreadPoolExecutor() as pool:
            written = pool.submit(pipe.write_bytes, stored.read_bytes())
            bundle_id = state.add_file(pipe)
            assert written.result() == stored.stat().st_size
        assert bank.bundles() == {bundle_id: made.users}
    state.close()


def test_over_http_a_damaged_page_ends_its_users_requests_alone(
    stored: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    state = ServerState.open(tmp_path / "state", bank)
    state.activate(state.add_file(stored))
    (path,) = (tmp_path / "state" / "bundles").glob("*.safetensors")
    at = int(index.of(index.StoredFile(path)).arrays["begins"][1]) + 80
    whole = path.read_bytes()
    with Engine(model, tiny.tokenizer(), bank) as engine:
        app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH), state=state)
        with tiny.listening(app) as url, httpx.Client(base_url=url, timeout=60) as client:

            def ask(user: str) -> httpx.Response:
                parameters = {"adapter_id": user, "max_new_tokens": 6}
                return client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})

            def write(byte: int) -> None:
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(bytes([byte]))

            write(whole[at] ^ 16)
            users = ["carol", "alice", "dora", "bob"] * 3  # carol's and dora's page
            with ThreadPoolExecutor(6) as pool:
                answers = dict(zip(users, pool.map(ask, users), strict=True))
            for user in ("carol", "dora"):
                said = answers[user].json()
                assert answers[user].status_code == 424 and said["error_type"] == "generation"
                assert f"user {user!r}: page 1: damaged since the file was checked" in said["error"]
            for user in ("alice", "bob"):
                assert answers[user].json()["generated_text"] == expected[user]
            write(whole[at])
            assert ask("carol").json()["generated_text"] == expected["carol"]
            figures = client.get("/metrics").text
            assert 'soppu_resident_reads_total{outcome="failure"} ' in figures
            assert 'soppu_bundle_users{active="true"' in figures
    assert bank.figures().failures >= 2 and bank.figures().count == 3
    state.close()
