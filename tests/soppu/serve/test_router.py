"""A server with a router: what is routed, by whom, what the answer says, and that nothing else changes."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from soppu.errors import RouterError
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.router import deciding
from soppu.serve.router.deciding import RequestRouter, RouterOptions
from soppu.serve.router.file import RouterFile
from tests.soppu.serve import routing, talking, tiny
from tests.soppu.serve.talking import BUNDLE_ID

PROMPT = "the quick brown"
Start = Callable[..., TestClient]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[talking.Talker]:
    with talking.talker(tmp_path_factory.mktemp("state")) as talker:
        with talker.engine:
            yield talker


@pytest.fixture
def start(talker: talking.Talker, tmp_path: Path) -> Start:
    """A client of the engine behind an application with a router of these options; "off" has none."""

    def build(found: RouterFile | None = None, **options: Any) -> TestClient:
        path = routing.written(tmp_path / "router.json", found or routing.router(BUNDLE_ID))
        wanted = RouterOptions(path, **options)
        router = deciding.opened(wanted, engine=talker.engine, model=talker.model)
        app = create_app(
            talker.engine,
            info=ServerInfo("tiny", tiny.BASE_HASH),
            state=None,
            router=router,  # type: ignore[arg-type]
        )
        return TestClient(app)  # not entered: the engine runs already, and goes on

    return build


def generate(client: TestClient, user: str = "", prompt: str = PROMPT, **parameters: Any) -> Any:
    body = {"max_new_tokens": 6, "details": True, **parameters} | ({"adapter_id": user} if user else {})
    answer = client.post("/generate", json={"inputs": prompt, "parameters": body})
    assert answer.status_code == 200, answer.text
    return answer


def tokens(answer: Any) -> list[int]:
    return [token["id"] for token in answer.json()["details"]["tokens"]]


def test_off_reads_no_file_and_says_nothing(talker: talking.Talker, start: Start) -> None:
    assert deciding.opened(RouterOptions(Path("/nowhere")), engine=talker.engine, model=talker.model) is None
    answer = generate(start(mode="off"), "alice")
    assert not any(name.startswith("x-router") for name in answer.headers)
    assert "router" not in answer.json()["details"]


def test_on_answers_as_the_plain_arm_does_token_for_token(start: Start) -> None:
    plain, on = start(mode="off"), start(mode="on")
    base, alice, bob = (tokens(generate(plain, user)) for user in ("", "alice", "bob"))
    assert base != alice and base != bob
    routed = generate(on, "alice")
    assert tokens(routed) == base
    assert routed.headers["x-router-arm"] == "base" and "x-adapter-id" not in routed.headers
    assert routed.json()["details"]["router"] == {
        "mode": "on",
        "arm": "base",
        "policy": "gain",
        "choice": "base",
    }
    kept = generate(on, "bob")
    assert tokens(kept) == bob
    assert kept.headers["x-router-arm"] == "personal" and kept.headers["x-adapter-id"] == "bob"


def test_streams_and_openai_are_routed_alike(start: Start) -> None:
    plain, on = start(mode="off"), start(mode="on")
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "alice", "max_new_tokens": 6, "details": True}}
    streamed = on.post("/generate_stream", json=body)
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data:"))
    assert streamed.headers["x-router-arm"] == "base" and last["details"]["router"]["arm"] == "base"
    assert last["generated_text"] == generate(plain).json()["generated_text"]
    asked = {"prompt": [PROMPT, "def main"], "max_tokens": 6, "temperature": 0}

    def texts(client: TestClient, model: str) -> list[str]:
        answer = client.post("/v1/completions", json={**asked, "model": model}).json()
        return [choice["text"] for choice in answer["choices"]]

    assert texts(on, "alice") == texts(plain, "tiny")
    for stream in (False, True):
        routed = on.post("/v1/completions", json={**asked, "model": "alice", "stream": stream})
        assert routed.headers["x-router-arm"] == "base" and routed.headers["x-router-mode"] == "on"
    chat = {"model": "bob", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert on.post("/v1/chat/completions", json=chat).headers["x-router-arm"] == "personal"


def test_shadow_changes_nothing_and_says_what_it_would_do(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain, shadow = start(mode="off"), start(mode="shadow")
    answer = generate(shadow, "alice")
    assert tokens(answer) == tokens(generate(plain, "alice")) and answer.headers["x-adapter-id"] == "alice"
    assert answer.headers["x-router-arm"] == "personal" and answer.headers["x-router-choice"] == "base"
    assert "alice is answered by personal; gain would take base" in caplog.text
    generate(shadow)
    figures = shadow.get("/metrics").text
    labels = 'arm="personal",choice="base",mode="shadow",policy="gain"'
    assert f"soppu_router_decisions_total{{{labels}}} 1.0" in figures
    assert 'soppu_router_passed_total{why="no user"} 1.0' in figures
    assert 'soppu_router_deciding_seconds_count{policy="gain"} 1.0' in figures
    assert "soppu_router" not in plain.get("/metrics").text


@pytest.mark.parametrize("split", ["users", "requests"])
def test_ab_draws_by_hash_a_share_that_follows_the_seed(
    talker: talking.Talker, start: Start, split: str
) -> None:
    found = replace(routing.router(BUNDLE_ID, prior={"alice": (1.0, 1.0), "bob": (1.0, 1.0)}))

    def drawn(share: float, seed: int = 0) -> list[bool]:
        options = RouterOptions(None, mode="ab", share=share, seed=seed, split=split)
        router = RequestRouter(found, options, engine=talker.engine, model=talker.model)
        asked = [GenerationRequest(f"{n}", adapter_id=user) for n in range(100) for user in ("alice", "bob")]
        return [router.decide(request).arm == "base" for request in asked]

    assert not any(drawn(0.0)) and all(drawn(1.0))
    half, again = drawn(0.5), drawn(0.5)
    assert half == again  # a hash, and no coin
    # a larger share keeps who was in
    assert all(low <= high for low, high in zip(drawn(0.3), half, strict=True))
    if split == "users":
        assert len(set(half[::2])) == len(set(half[1::2])) == 1
        assert len({(drawn(0.5, seed)[0], drawn(0.5, seed)[1]) for seed in range(12)}) > 1
    else:
        assert 70 < sum(half) < 130 and half != drawn(0.5, 1)


def test_ab_says_who_is_control(start: Start) -> None:
    answer = generate(start(mode="ab", share=0.0), "alice")
    assert answer.headers["x-router-why"] == "control" and answer.headers["x-router-arm"] == "personal"
    assert generate(start(mode="ab", share=1.0), "alice").headers["x-router-arm"] == "base"


def test_who_names_a_version_or_nobody_gets_what_they_name(start: Start) -> None:
    plain, on = start(mode="off"), start(mode="on")
    named = f"alice@{BUNDLE_ID[:6]}"
    answer = generate(on, named)
    assert answer.headers["x-router-why"] == "version named"
    assert tokens(answer) == tokens(generate(plain, named)) == tokens(generate(plain, "alice"))
    assert generate(on).headers["x-router-why"] == "no user"
    unknown = on.post("/generate", json={"inputs": PROMPT, "parameters": {"adapter_id": "nobody"}})
    assert unknown.status_code == 424


@pytest.mark.parametrize("policy", ["personal", "base", "length", "neighbours", "likelihood"])
def test_every_policy_decides_in_a_server(start: Start, policy: str) -> None:
    answer = generate(start(mode="on", policy=policy), "alice")
    assert answer.headers["x-router-policy"] == policy
    assert answer.headers["x-router-arm"] in ("base", "personal")
    if policy in ("personal", "base"):
        assert answer.headers["x-router-arm"] == policy


def test_neighbours_and_likelihood_read_the_prompt_as_the_model_does(talker: talking.Talker) -> None:
    found = routing.router(BUNDLE_ID)
    seen = {}
    for policy in ("neighbours", "likelihood"):
        router = RequestRouter(
            found, RouterOptions(None, mode="on", policy=policy), engine=talker.engine, model=talker.model
        )
        seen[policy] = router._question(GenerationRequest(PROMPT, adapter_id="alice"))
    ids = talker.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    states = tiny.llama()(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert np.allclose(seen["neighbours"].vectors[0], states[0].mean(0).numpy(), atol=1e-4)
    adapter = tiny.lora(tiny.llama(), seed=1)
    for place, one in enumerate((None, adapter)):
        loss = float(tiny.merged(tiny.llama(), one)(input_ids=ids, labels=ids).loss)
        assert seen["likelihood"].reading[0, place] == pytest.approx(loss, abs=1e-3)


def test_a_prompt_that_is_refused_is_refused_by_the_engine(start: Start) -> None:
    on = start(mode="on", policy="neighbours")
    body = {"inputs": "x" * 500, "parameters": {"adapter_id": "alice"}}
    answer = on.post("/generate", json=body)
    assert answer.status_code == 422 and "must have less than" in answer.json()["error"]
    assert 'soppu_router_passed_total{why="refused"} 1.0' in on.get("/metrics").text


def test_a_router_of_another_base_or_bundle_is_refused_at_the_start(start: Start) -> None:
    with pytest.raises(RouterError, match=r"base model tiny \(cccccccccccc\), this server has one \(bbbb"):
        start(routing.router(BUNDLE_ID, base_hash="c" * 64), mode="on")
    with pytest.raises(RouterError, match="made for bundle dddddddddddd, but bundle c0ffee000000 is active"):
        start(routing.router("d" * 64), mode="shadow")
    with pytest.raises(RouterError, match="policy 'best', allowed: personal, base, gain"):
        start(mode="on", policy="best")
    with pytest.raises(RouterError, match="needs a router: --router FILE"):
        deciding.opened(RouterOptions(mode="on"), engine=None, model=None)  # type: ignore[arg-type]


def test_once_another_bundle_is_active_nothing_is_routed(talker: talking.Talker, start: Start) -> None:
    on = start(mode="on")
    with contextlib.ExitStack() as after:
        talker.bank.stage(talking.members(), bundle_id="e" * 64)
        talker.bank.activate("e" * 64)
        after.callback(talker.bank.drop, "e" * 64)
        after.callback(talker.bank.activate, BUNDLE_ID)
        answer = generate(on, "alice")
    assert answer.headers["x-router-why"] == "another bundle" and answer.headers["x-adapter-id"] == "alice"


def test_a_prompt_is_another_name_of_inputs_and_not_both(start: Start) -> None:
    on = start(mode="on")
    short = {"parameters": {"max_new_tokens": 4}}
    answers = [on.post("/generate", json={name: PROMPT, **short}).json() for name in ("prompt", "inputs")]
    assert answers[0] == answers[1] and answers[0]["generated_text"]
    both = on.post("/generate", json={"prompt": PROMPT, "inputs": PROMPT})
    assert both.status_code == 422 and "at most one of `inputs` or `prompt`" in both.json()["error"]
    assert "missing field `inputs`" in on.post("/generate", json={}).json()["error"]
    assert "must be a string" in on.post("/generate", json={"prompt": 5}).json()["error"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_of_the_system_this_began_with_is_answered(tmp_path: Path) -> None:
    path = routing.written(tmp_path / "router.json", routing.router(BUNDLE_ID))
    with talking.talker(tmp_path / "state") as own:
        router = deciding.opened(RouterOptions(path, mode="on"), engine=own.engine, model=own.model)
        info = ServerInfo("tiny", tiny.BASE_HASH)
        app = create_app(own.engine, info=info, state=None, router=router)  # type: ignore[arg-type]
        with tiny.listening(app) as url:
            said = curl(url, {"prompt": PROMPT, "parameters": {"adapter_id": "alice", "max_new_tokens": 4}})
            nobody = curl(url, {"prompt": PROMPT, "parameters": {"max_new_tokens": 4}})
    assert said[0] == nobody[0] == "base" and said[1] == nobody[1] and said[1]["generated_text"]


def curl(url: str, body: dict[str, Any]) -> tuple[str, Any]:
    """The arm that answered, and the answer."""
    words = ["curl", "-sS", "--fail-with-body", "-X", "POST", f"{url}/generate", "-d", json.dumps(body)]
    words += ["-H", "Content-Type: application/json", "-w", "\n%header{x-router-arm}"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    answer, _, arm = said.rpartition("\n")
    return arm, json.loads(answer)
