"""A real vLLM server with the plugin: every user's own text, loading, refusing, and swapping under load."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import requests
from click.testing import CliRunner

from soppu import adapter as adapters
from soppu.cli import main
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import TargetError
from soppu.federation.simulation import free_port
from soppu.registry import Registry
from soppu.targets import process
from soppu.targets.vllm import VllmLaunch, VllmTarget
from tests.soppu.serve.vllm_plugin import live

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@dataclass(frozen=True)
class Server:
    target: VllmTarget
    launch: VllmLaunch
    bundle: Bundle
    bundle_id: str
    texts: live.Texts
    folder: Path

    def ask(self, model: str) -> requests.Response:
        body = {"model": model, "prompt": live.PROMPT, "max_tokens": live.TOKENS, "temperature": 0}
        return requests.post(f"{self.target.url}/v1/completions", json=body, timeout=300)

    def text(self, model: str) -> str:
        response = self.ask(model)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def wanted(self, user: str) -> str:
        return self.texts.of(self.bundle.reconstruct(user) if user else None)

    def post(self, path: str, **body: str) -> requests.Response:
        return requests.post(f"{self.target.url}/v1/{path}", json=body, timeout=300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    live.require()
    folder, target, bundle = tmp_path_factory.mktemp("vllm"), live.target(), live.bundle(clusters=2)
    launch = live.launch(folder, bundle)
    assert target.start(launch)
    bundle_id = hashlib.sha256(launch.bundle.read_bytes()).hexdigest()
    yield Server(target, launch, bundle, bundle_id, live.Texts(), folder)
    assert process.stop(launch.pid_file)
    assert not target.is_up()


def test_every_user_says_what_transformers_says_with_that_adapter(server: Server) -> None:
    texts = {user: server.text(user) for user in live.USERS}
    assert texts == {user: server.wanted(user) for user in live.USERS}
    assert server.text("base") == server.wanted("")
    assert len({*texts.values(), server.wanted("")}) > len(live.USERS) // 2


def test_figures_tell_who_is_served_and_who_is_in_memory(server: Server) -> None:
    assert server.text("ann") == server.wanted("ann")
    users, deadline = len(live.USERS), time.monotonic() + 60
    wanted = f'soppu_bundle_users{{active="true",bundle="{server.bundle_id[:12]}"}} {float(users)}'
    text = ""
    while 'soppu_resident_reads_total{outcome="success"} 0.0' in text or not text:  # as at the scrape before
        assert time.monotonic() < deadline, text
        text = requests.get(f"{server.target.url}/metrics", timeout=60).text
    assert wanted in text and "soppu_resident_limit_bytes 1.073741824e+09" in text
    assert 'soppu_resident_reads_total{outcome="failure"} 0.0' in text


def test_a_mixed_batch_with_one_prompt_for_all_keeps_users_apart(server: Server) -> None:
    models = [*live.USERS, "base", f"bob@{server.bundle_id}", f"cem@{server.bundle_id[:10]}"] * 4
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(server.text, models))
    names = ["" if model == "base" else model.partition("@")[0] for model in models]
    assert texts == [server.wanted(name) for name in names]


def test_names_are_listed_and_an_unknown_one_is_not_found(server: Server) -> None:
    listed = requests.get(f"{server.target.url}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in listed] == ["base", *live.USERS]
    for name in ("nobody", "ann@0000", "nobody@" + server.bundle_id, "other:ann", "base:nobody"):
        response = server.ask(name)
        assert response.status_code == 404 and name in response.text


def test_names_are_told_as_routers_of_fleets_ask_for_them(server: Server) -> None:
    """production-stack reads id and parent of each model; Ray Serve LLM asks for "base:user"."""

    def get(**query: str | int) -> dict[str, Any]:
        answer = requests.get(f"{server.target.url}/v1/models", params=query, timeout=60)
        assert answer.status_code == (422 if query.get("after") == "x" else 200), answer.text
        return dict(answer.json())

    cards = {card["id"]: card for card in get()["data"]}
    assert cards["base"]["parent"] is None and cards["base"]["root"] == str(server.launch.model)
    for user in live.USERS:
        assert cards[user]["parent"] == "base" and cards[user]["root"] == f"soppu:{server.bundle_id}"
        assert cards[user]["max_model_len"] == cards["base"]["max_model_len"] == 1024
    page = get(limit=2)
    assert [card["id"] for card in page["data"]] == ["base", "ann"] and page["has_more"]
    page = get(limit=2, after="ann")
    assert [card["id"] for card in page["data"]] == ["bob", "cem"] and page["last_id"] == "cem"
    assert [card["id"] for card in get(prefix="do")["data"]] == ["dora"]
    assert "`after` must be" in str(get(after="x"))
    assert server.text("base:ann") == server.wanted("ann")


def test_a_target_completes_and_its_canaries_pass(server: Server) -> None:
    target = server.target
    assert target.is_up() and not target.start(server.launch)
    assert target.active() == server.bundle_id and target.bundles() == (server.bundle_id,)
    assert target.complete(live.PROMPT, user="ann", max_new_tokens=live.TOKENS) == server.wanted("ann")
    assert target.complete(live.PROMPT, max_new_tokens=live.TOKENS) == server.wanted("")
    for workers in (1, 4):
        faults = target.canary(live.USERS, live.PROMPT, bundle_id=server.bundle_id, workers=workers)
        assert faults == [""] * len(live.USERS)
    (fault,) = target.canary(["nobody"], live.PROMPT, bundle_id=server.bundle_id)
    assert "404" in fault


def test_verify_target_passes_it_against_the_bundle_it_serves(server: Server) -> None:
    asked = ["--bundle", str(server.launch.bundle), "--model", str(server.launch.model), "--json"]
    result = CliRunner().invoke(main, ["verify-target", server.target.url, *asked])
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["kind"] == "vllm" and told["failed"] == [], result.stdout
    verdicts = {point["name"]: point["verdict"] for point in told["points"]}
    passed = ("health", "base", "answers", "warm", "header", "effect", "canary", "missing", "alive")
    assert {verdicts[name] for name in passed} == {"pass"}


def test_an_adapter_without_effect_fails_its_canary(server: Server) -> None:
    nothing = live.bundle(("ann", "bob"), clusters=2)
    parts = replace(nothing, norm=nothing.norm * 0)
    path = server.folder / "nothing.soppu"
    bundle_id = parts.save(path)
    server.target.publish(path, bundle_id=bundle_id)
    (fault,) = server.target.canary(["ann"], live.PROMPT, bundle_id=bundle_id)
    assert "has no effect" in fault
    assert server.target.canary(["ann"], live.PROMPT, bundle_id=bundle_id, zero_users=["ann"]) == [""]
    server.target.drop(bundle_id)


def test_an_adapter_on_the_basis_is_loaded_while_the_server_runs(server: Server) -> None:
    # several subspaces make a name's own: this one shares its subspace with users of the bundle
    made = live.adapter("newcomer", clusters=2)
    adapters.write(made, server.folder / "newcomer")
    response = server.post(
        "load_lora_adapter", lora_name="newcomer", lora_path=str(server.folder / "newcomer")
    )
    assert response.status_code == 200, response.text
    assert server.text("newcomer") == server.texts.of(made)
    again = server.post("load_lora_adapter", lora_name="newcomer", lora_path=str(server.folder / "newcomer"))
    assert again.status_code == 400 and "already been loaded" in again.text
    assert server.post("unload_lora_adapter", lora_name="newcomer").status_code == 200
    assert server.ask("newcomer").status_code == 404


def test_an_adapter_off_the_basis_is_refused_with_its_error(server: Server) -> None:
    adapters.write(live.adapter("stranger", inside=False), server.folder / "stranger")
    response = server.post(
        "load_lora_adapter", lora_name="stranger", lora_path=str(server.folder / "stranger")
    )
    assert response.status_code == 400
    assert "'stranger': relative error" in response.text and "0.1000 is allowed" in response.text
    assert server.post("unload_lora_adapter", lora_name="ann").status_code == 400


def test_own_numbers_and_cores_are_served_beside_each_other(server: Server) -> None:
    """The default method, and a bundle of users with cores, with own numbers, and with both, in one batch."""
    staged = {}
    for bundle in (live.residual(("ann", "bob")), live.mixed()):
        path = server.folder / f"{len(staged)}.soppu"
        staged[bundle.save(path)] = bundle
        assert server.target.publish(path, bundle_id=list(staged)[-1])
    asked = [
        (bundle, f"{user}@{bundle_id}", user) for bundle_id, bundle in staged.items() for user in bundle.users
    ]
    asked += [(server.bundle, "ann", "ann"), (server.bundle, "base", "")]
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(server.text, [model for _, model, _ in asked] * 2))
    wanted = [server.texts.of(bundle.reconstruct(user) if user else None) for bundle, _, user in asked]
    assert texts == wanted * 2 and len(set(wanted)) >= len(asked) - 1
    for bundle_id, bundle in staged.items():
        assert not any(server.target.canary(bundle.users, live.PROMPT, bundle_id=bundle_id))
        server.target.drop(bundle_id)


def test_admin_routes_ask_for_the_token(server: Server) -> None:
    with pytest.raises(TargetError, match="an admin token is needed"):
        VllmTarget(server.target.url).bundles()


def test_a_bundle_is_swapped_under_load_and_no_request_fails(server: Server) -> None:
    second = live.bundle(("ann", "bob", "eve"), clusters=2, strength=3.0)
    path = server.folder / "second.soppu"
    second_id = second.save(path)
    old, new = server.wanted("ann"), server.texts.of(second.reconstruct("ann"))
    assert old != new
    stop, switched = Event(), Event()

    def keep_asking(_: int) -> list[tuple[bool, str]]:
        found = []
        while not stop.is_set():
            after = switched.is_set()
            found.append((after, server.text("ann")))
        return found

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(8)]
        try:
            time.sleep(2)
            assert server.target.publish(path, bundle_id=second_id)
            assert server.text(f"ann@{second_id}") == new
            server.target.activate(second_id)
            switched.set()
            server.target.drop(server.bundle_id)
            time.sleep(4)
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result()]
    assert {text for after, text in answers if after} == {new}
    assert {text for after, text in answers if not after} <= {old, new}
    assert server.target.bundles() == (second_id,) and server.ask("cem").status_code == 404
    assert server.target.publish(server.launch.bundle, bundle_id=server.bundle_id)
    server.target.rollback(server.bundle_id)
    assert server.text("ann") == old
    server.target.drop(second_id)


def test_kill_minus_nine_loses_nothing_and_the_replica_follows_a_registry(server: Server) -> None:
    """The restart runs model runner V2, by Triton's interpreter: same names, same texts."""
    second = live.bundle(("ann", "bob", "eve"), clusters=2, strength=3.0)
    path = server.folder / "second.soppu"
    second_id = second.save(path)
    server.target.publish(path, bundle_id=second_id)
    server.target.activate(second_id)
    adapters.write(live.adapter("newcomer", clusters=2), server.folder / "late")
    loaded = {"lora_name": "late", "lora_path": str(server.folder / "late")}
    assert server.post("load_lora_adapter", **loaded).status_code == 200
    path.unlink()
    group = json.loads(server.launch.pid_file.read_text())["pid"]
    os.killpg(group, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(group)] if psutil.pid_exists(group) else [], timeout=30)

    registry = Registry.open(server.folder / "registry")
    follow = {"SOPPU_FOLLOW": str(server.folder / "registry"), "SOPPU_FOLLOW_SECONDS": "0.5"}
    eager = (*server.launch.options, "--enforce-eager")
    environment = {**server.launch.environment, **live.V2, **follow}
    assert server.target.start(replace(server.launch, options=eager, environment=environment))
    assert "Using V2 Model Runner" in server.launch.log.read_text()
    assert server.target.active() == second_id
    assert set(server.target.bundles()) == {server.bundle_id, second_id}
    wanted = {user: server.texts.of(second.reconstruct(user)) for user in second.users}
    wanted |= {f"cem@{server.bundle_id}": server.wanted("cem"), "base": server.wanted("")}
    wanted["late"] = server.texts.of(live.adapter("newcomer", clusters=2))
    with ThreadPoolExecutor(8) as pool:
        assert dict(zip(wanted, pool.map(server.text, wanted), strict=True)) == wanted
    told = requests.get(f"{server.target.url}/soppu/v1/health", timeout=60)
    assert told.status_code == 503 and "nothing was published" in told.json()["following"]["error"]
    assert told.json()["previous"] == server.bundle_id

    third = live.mixed()
    third_path = server.folder / "third.soppu"
    third.save(third_path)
    set_id = registry.freeze_current(
        live.base().base, chosen={"own": registry.put_adapter(third.reconstruct("own"), user="own")}
    )
    third_id = registry.put_bundle(third_path.read_bytes(), set_id=set_id)
    registry.record_publication(target="vllm", url="http://elsewhere", bundle_id=third_id)
    deadline = time.monotonic() + 60
    while server.target.active() != third_id and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.text("both") == server.texts.of(third.reconstruct("both"))
    told = requests.get(f"{server.target.url}/soppu/v1/health", timeout=60)
    assert told.status_code == 200 and told.json()["following"]["published"] == third_id


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    launch = VllmLaunch(tmp_path / "python", tmp_path, tmp_path / "b", tmp_path / "log", tmp_path / "pid")
    with pytest.raises(TargetError, match="no such Python; `make vllm`"):
        VllmTarget(f"http://127.0.0.1:{free_port()}", base_hash="c" * 64).start(launch)
