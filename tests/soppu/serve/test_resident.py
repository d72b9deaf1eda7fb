"""Adapters read at first use: once however many ask, a bounded number kept, none taken from a request."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.errors import RequestError
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank import folders, resident
from soppu.serve.bank.bank import AdapterBank, Mount
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from tests.soppu.serve import tiny

PATHS = [f"adapters/user{number}/v1" for number in range(6)]
PROMPT = "the quick"
_MODEL = tiny.llama()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volume")
    for path, made in MEMBERS.items():
        adapters.write(made, folder / path)
    return folder


MEMBERS: dict[str, LoraAdapter] = {path: tiny.lora(_MODEL, seed=seed) for seed, path in enumerate(PATHS, 1)}


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    torch.set_num_threads(1)
    return {path: tiny.peft_text(tiny.llama(), PROMPT, made, tokens=6) for path, made in MEMBERS.items()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders read, in order."""
    torch.set_num_threads(1)
    names, read = list[str](), folders.read

    def noted(root: Path, name: str) -> LoraAdapter:
        names.append(name)
        return read(root, name)

    monkeypatch.setattr(folders, "read", noted)
    return names


def make_bank(root: Path, *, max_active: int = 1024) -> AdapterBank:
    return AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, mount=Mount(root, max_active))


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """Results, or the errors raised, of calls that begin together in threads of their own."""
    together = threading.Barrier(len(calls), timeout=60)

    def run(call: Callable[[], object]) -> object:
        together.wait()
        try:
            return call()
        except RequestError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_many_who_ask_for_one_new_adapter_at_once_have_it_read_once(root: Path, reads: list[str]) -> None:
    bank = make_bank(root)
    found = at_once([lambda: bank.resolve(PATHS[0])] * 16)
    assert reads == PATHS[:1]
    assert len({id(resolved.where) for resolved in found}) == 1  # type: ignore[attr-defined]
    assert len({id(resolved) for resolved in found}) == 16


def test_many_who_ask_for_one_bad_adapter_at_once_all_hear_the_cause(
    root: Path, reads: list[str], tmp_path: Path
) -> None:
    bank = make_bank(tmp_path)
    found = at_once([lambda: bank.resolve("adapters/user0/v1")] * 16)
    assert all(isinstance(error, RequestError) and "No valid adapter config" in str(error) for error in found)
    adapters.write(MEMBERS[PATHS[0]], tmp_path / PATHS[0])
    assert bank.resolve(PATHS[0]).version == MEMBERS[PATHS[0]].content_hash()


def test_different_adapters_asked_for_at_once_are_each_read_once(root: Path, reads: list[str]) -> None:
    bank = make_bank(root)
    found = at_once([lambda path=path: bank.resolve(path) for path in PATHS * 3])  # type: ignore[misc]
    assert sorted(reads) == PATHS
    hashes = [MEMBERS[path].content_hash() for path in PATHS * 3]
    assert [resolved.version for resolved in found] == hashes  # type: ignore[attr-defined]


def test_the_least_recently_used_is_let_go_first(root: Path, reads: list[str]) -> None:
    bank = make_bank(root, max_active=2)
    a, b, c = PATHS[:3]
    for path in (a, b, a, c):
        bank.resolve(path)
    assert list(bank.residents()) == [a, c] and reads == [a, b, c]
    bank.resolve(b)
    assert list(bank.residents()) == [c, b] and reads == [a, b, c, b]


def test_what_a_request_is_on_stays_and_goes_once_it_has_finished(root: Path, reads: list[str]) -> None:
    bank = make_bank(root, max_active=2)
    a, b, c, d = PATHS[:4]
    running = [bank.resolve(a), bank.resolve(b), bank.resolve(b)]
    for path in (c, d, c):
        bank.resolve(path)
    assert list(bank.residents()) == [a, b, c]  # and one beside, or nobody else could be served
    del running[2]
    assert bank.resolve(d).where and list(bank.residents()) == [a, b, d]
    assert bank.resolve(a).where is running[0].where
    assert list(bank.residents()) == [b, a]  # all that is over is in use
    running.clear()
    bank.resolve(d)
    assert list(bank.residents()) == [a, d]
    assert reads == [a, b, c, d, c, d, d]


def test_only_a_bounded_number_waits_to_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_MAX_UNREAD", 4)
    bank = make_bank(root)
    with bank._changing:  # the last step of a reading waits for it
        waiting = [bank.reading(path) for path in PATHS[:4]]
        assert bank.reading(PATHS[0]) is waiting[0]
        with pytest.raises(RequestError) as caught:
            bank.reading(PATHS[4])
        assert (caught.value.status, caught.value.error_type) == (429, "overloaded")
    for future in waiting:
        assert future is not None
        future.result(30)
    assert bank.resolve(PATHS[4]).where and bank.reading(PATHS[0]) is None


def test_answers_are_right_while_a_small_table_changes_all_the_time(
    root: Path, expected: dict[str, str], reads: list[str]
) -> None:
    torch.set_num_threads(1)
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root, 2))
    jobs = random.Random(0).choices(PATHS, k=60)
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(max_batch=4)) as engine:

        def ask(path: str) -> str:
            return engine.submit(GenerationRequest(PROMPT, path, max_new_tokens=6)).result()[1].text

        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(ask, jobs)) == [expected[path] for path in jobs]
    assert len(reads) > len(PATHS)  # some were let go and came back
    bank.resolve(jobs[-1])
    assert len(bank.residents()) <= 2


def test_while_an_adapter_is_read_all_others_are_answered(
    root: Path, expected: dict[str, str], tmp_path: Path, reads: list[str]
) -> None:
    """More requests wait for it than the server has threads, and neither its loop nor its engine waits."""
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH, mount=Mount(root))
    bank.add("dave", tiny.lora(tiny.llama(), seed=50))
    state = ServerState.open(tmp_path / "state", bank)

    async def scenario(client: httpx.AsyncClient) -> None:
        async def ask(adapter_id: str) -> str:
            parameters = {"adapter_id": adapter_id, "max_new_tokens": 6}
            response = await client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
            return str(response.json().get("generated_text"))

        with bank._changing:  # the last step of a reading waits for it
            waiting = [asyncio.create_task(ask(PATHS[0])) for _ in range(60)]
            gone = asyncio.create_task(ask(PATHS[0]))
            while not reads:
                await asyncio.sleep(0.01)
            gone.cancel()  # takes the adapter from nobody else
            others = await asyncio.wait_for(asyncio.gather(ask("dave"), ask(""), ask("")), 60)
            assert not any(task.done() for task in waiting)
        assert set(await asyncio.gather(*waiting)) == {expected[PATHS[0]]}
        assert len(set(others)) == 2 and "None" not in others

    with Engine(model, tiny.tokenizer(), bank) as engine:
        app = create_app(engine, info=ServerInfo("tiny", tiny.BASE_HASH), state=state)

        async def main() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60) as client:
                await scenario(client)

        asyncio.run(main())
    state.close()
    assert reads == PATHS[:1]
