"""Everything alice tries to reach bob's model by is refused, and no server hears of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.soppu.gateway.attempts import ATTEMPTS, Attempt
from tests.soppu.gateway.house import House, house


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("gateway"), limits={"requests": ""}) as one:
        yield one


@pytest.fixture(scope="module")
def client(open_house: House) -> Iterator[TestClient]:
    with open_house.client() as one:
        yield one


def test_there_are_many_and_no_two_alike() -> None:
    assert len(ATTEMPTS) >= 120
    assert len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS)


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_an_attempt_is_refused_and_reaches_no_server(
    open_house: House, client: TestClient, attempt: Attempt
) -> None:
    headers = [*attempt.headers, *(open_house.headers().items() if attempt.key else ())]
    if "content-type" not in {name.lower() for name, _ in headers}:
        headers.append(("content-type", "application/json"))
    answer = client.request(attempt.method, attempt.path, content=attempt.content, headers=headers)
    assert answer.status_code == attempt.status, answer.text
    assert open_house.upstream.heard == []
    assert answer.json()["error"] and "bob" not in answer.json()["error"]


def test_the_same_requests_with_one_s_own_name_are_answered(open_house: House, client: TestClient) -> None:
    """So that what is refused above is refused for what it names."""
    for body in (
        {"inputs": "hi", "parameters": {"adapter_id": "alice"}},
        {"inputs": "hi", "parameters": {"adapter_id": ""}},
        {"inputs": "hi", "parameters": {"adapter_id": None, "adapter_source": "local"}},
        {"inputs": "hi", "model": "alice"},
        {"inputs": "hi"},
    ):
        answer = client.post(
            "/generate", json=body, headers={**open_house.headers(), "x-adapter-id": "alice"}
        )
        assert answer.status_code == 200 and answer.json() == {"generated_text": "by alice"}
    heard = [body["parameters"]["adapter_id"] for _, body, _ in open_house.upstream.heard]
    assert heard == ["alice"] * 5
    open_house.upstream.heard.clear()
