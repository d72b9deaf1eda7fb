"""The list of models at a million names: capped, by pages, by prefix; what routers of fleets read in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.datastructures import QueryParams

from soppu.errors import RequestError
from soppu.serve.api.openai.models import Wanted
from soppu.serve.vllm_plugin.frontend import listing
from soppu.serve.vllm_plugin.frontend.control import Control
from soppu.serve.vllm_plugin.settings import Settings
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine
from tests.soppu.serve.vllm_plugin.commanded import SHARED

MANY = 1_000_000
BASE = {"id": "base", "object": "model", "root": "/m", "parent": None, "max_model_len": 1024}


def test_a_million_names_are_capped_and_found_by_how_they_begin() -> None:
    read = 0

    def names() -> Iterator[tuple[str, str]]:
        nonlocal read
        for number in range(MANY):
            read += 1
            yield f"user-{number:07d}", "v"

    page, more = Wanted(1000).page(names())
    assert len(page) == 1000 and more and read == 1001  # no more of them is looked at
    page, more = Wanted(1000, prefix="user-09999").page(names())
    assert [name for name, _ in page] == [f"user-09999{number:02d}" for number in range(100)] and not more
    page, more = Wanted(2, after="user-0999997").page(names())
    assert page == [("user-0999998", "v"), ("user-0999999", "v")] and not more
    page, more = Wanted(1, after="user-0000000", prefix="user-05").page(names())
    assert page == [("user-0500000", "v")] and more
    with pytest.raises(RequestError, match="`after` must be"):
        Wanted(1, after="user-9999999").page(names())


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    path = tmp_path / "first.soppu"
    handmade.bundle(engine.SHAPES, {name: [SHARED] for name in ("ann", "bob", "cem")}).save(path)
    made = Control(
        Settings(path, tmp_path / "state", models_limit=3), base_hash=tiny.BASE_HASH, reserved=["base", "b2"]
    )
    yield made
    made.close()


def test_the_list_is_capped_and_says_that_there_is_more(control: Control) -> None:
    cards = [BASE, BASE | {"id": "b2"}]
    told = listing.body(control, QueryParams(""), cards)
    assert [card["id"] for card in told["data"]] == ["base", "b2", "ann"] and told["has_more"]
    rest = listing.body(control, QueryParams(f"limit=10&after={told['last_id']}"), cards)
    assert [card["id"] for card in rest["data"]] == ["bob", "cem"] and not rest["has_more"]
    assert [card["id"] for card in listing.body(control, QueryParams("prefix=b"), cards)["data"]] == [
        "base",
        "b2",
        "bob",
    ]
    user = rest["data"][0]
    assert user["parent"] == "base" and user["root"] == f"soppu:{control.bank.active}"
    assert user["max_model_len"] == 1024  # vLLM's other fields are the base model's
    with pytest.raises(RequestError, match="between 1 and 10000"):
        listing.body(control, QueryParams("limit=10001"), cards)


def test_a_name_behind_the_base_model_s_is_that_user(control: Control) -> None:
    active = control.bank.active
    asked = {"ann": "ann", "base:ann": "ann", "b2:ann": "ann", f"b2:ann@{active[:8]}": f"ann@{active}"}
    for name, meant in asked.items():
        found = control.bank.resolve(name)
        assert found is not None and found.label == meant
    for name in ("other:ann", "base:nobody", "base:", "baseline:ann", "base:b2:ann"):
        assert control.bank.resolve(name) is None
