"""Users who join at the server itself: one row more, served at once, kept until a registry has them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from soppu.adapter import LoraPair
from soppu.compress import Bundle
from soppu.compress.joining import basis_of, put
from soppu.cores import basis_file, folder
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.api.joins import packed
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.bank.newcomers import Asked, Newcomers
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from tests.soppu.serve import tiny

TOKEN = {"authorization": f"Bearer {tiny.TOKEN}"}
PROMPT = {"inputs": "the quick", "parameters": {"max_new_tokens": 6, "details": True}}


class Server:
    """A server in this process that can be stopped and started again on the same folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundle = tiny.bundle(
            {name: tiny.lora(tiny.llama(), seed=n) for n, name in enumerate(("ann", "bob"))}
        )
        self.bundle_id = self.bundle.save(root / "bundle")
        self.start()
        self.state.add_bundle(root / "bundle", bundle_id=self.bundle_id)
        self.state.activate(self.bundle_id)

    def start(self) -> None:
        model = tiny.llama()
        bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
        self.state = ServerState.open(self.root / "state", bank)
        engine = Engine(model, tiny.tokenizer(), bank, EngineOptions())
        info = ServerInfo("tiny", tiny.BASE_HASH, admin_token=tiny.TOKEN)
        self.http = TestClient(create_app(engine, info=info, state=self.state))
        self.http.__enter__()

    def stop(self) -> None:
        self.http.__exit__(None, None, None)
        self.state.close()

    def text(self, user: str) -> Any:
        parameters = PROMPT["parameters"] | {"adapter_id": user}  # type: ignore[operator]
        answer = self.http.post("/generate", json=PROMPT | {"parameters": parameters})
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    def join(self, core: CoreAdapter, **query: str) -> Any:
        return self.post(self.tar(core), **query)

    def post(self, body: bytes, **query: str) -> Any:
        return self.http.post("/soppu/v1/join", params=query, content=body, headers=TOKEN)

    def tar(self, core: CoreAdapter, **metrics: float) -> bytes:
        place = self.root / "cores" / core.id
        folder.write(core, place)
        return packed(place, metrics=metrics)

    def joined(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/soppu/v1/joined", headers=TOKEN).json()["joined"]
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def core_of(bundle: Bundle, *, seed: int = 7, size: float = 0.5) -> CoreAdapter:
    basis, draw = basis_of(bundle), torch.Generator().manual_seed(seed)
    cores = {name: size * torch.randn(*shape, generator=draw) for name, shape in basis.core_shapes().items()}
    return CoreAdapter(basis.id, cores, {}, basis.base_model, basis.base_hash, basis.fan_in_fan_out)


def test_a_core_becomes_a_row_that_is_served_at_once_and_kept_over_a_restart(server: Server) -> None:
    before = {user: server.text(user) for user in ("ann", "bob")}
    sent = server.http.get("/soppu/v1/basis", headers=TOKEN)
    assert (sent.headers["x-bundle-id"], sent.headers["x-clusters"]) == (server.bundle_id, "1")
    (server.root / "basis").write_bytes(sent.content)
    basis = basis_file.read(server.root / "basis")
    assert basis.id == sent.headers["x-basis-id"] == basis_of(server.bundle).id
    core = core_of(server.bundle)
    answer = server.post(server.tar(core, loss_base=2.5), user="dora")
    told = answer.json()
    assert answer.status_code == 201 and told["new"] and told["before"] == server.bundle_id
    # the bundle is the one that anybody makes of it, so that a registry's has the same id
    made = put(server.bundle, "dora", CoreInBasis(core, basis)).bundle
    assert made.save(server.root / "made") == told["bundle_id"] == server.state.bank.active
    assert {user: server.text(user) for user in ("ann", "bob")} == before
    dora = server.text("dora")
    assert dora not in before.values()
    again = server.join(core, user="dora")
    assert again.status_code == 200 and not again.json()["new"] and len(server.joined()) == 1
    server.stop()
    server.start()
    assert server.text("dora") == dora and {user: server.text(user) for user in before} == before
    (kept,) = server.joined()
    assert kept["core_id"] == core.id and kept["metrics"] == {"loss_base": 2.5} and not kept["replaced"]
    came = server.http.get(f"/soppu/v1/joined/{kept['number']}", headers=TOKEN).content
    with tarfile.open(fileobj=BytesIO(came)) as tar:
        tar.extractall(server.root / "came", filter="data")
    assert folder.read(server.root / "came").id == core.id
    assert server.http.delete(f"/soppu/v1/joined/{kept['number']}", headers=TOKEN).status_code == 200
    assert server.joined() == [] and server.text("dora") == dora


def test_who_is_there_is_replaced_only_where_that_is_asked_for(server: Server) -> None:
    ann, one, other = server.text("ann"), core_of(server.bundle), core_of(server.bundle, seed=8)
    assert server.join(one, user="dora").status_code == 201
    first = server.text("dora")
    refused = server.join(other, user="dora")
    assert (
        refused.status_code == 409
        and "user 'dora' is in the active bundle already" in refused.json()["error"]
    )
    assert server.text("dora") == first
    assert server.join(other, user="dora", replace="true").json()["replaced"]
    assert server.text("dora") != first and server.text("ann") == ann
    for number in range(3):
        assert server.join(core_of(server.bundle, seed=20 + number), user=f"u{number}").status_code == 201
    # of joins the last bundle and the one before stay, and what was published
    assert len(server.state.bank.bundles()) == 3 and server.bundle_id in server.state.bank.bundles()


def test_joins_at_once_all_come_in_and_a_publication_meanwhile_is_not_undone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = {f"u{number}": core_of(server.bundle, seed=number + 30) for number in range(4)}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: server.join(one[1], user=one[0]), cores.items()))
    assert [answer.status_code for answer in answers] == [201] * 4
    users = server.state.bank.bundles()[server.state.bank.active]
    assert set(users) == {"ann", "bob", *cores}
    plain = server.state.add_bundle

    def published_meanwhile(source: Path, *, bundle_id: str) -> bool:
        new = plain(source, bundle_id=bundle_id)
        server.state.activate(server.bundle_id)
        return new

    monkeypatch.setattr(server.state, "add_bundle", published_meanwhile)
    late = server.join(core_of(server.bundle, seed=40), user="late")
    assert late.status_code == 409 and "somebody has changed it meanwhile" in late.json()["error"]
    assert server.state.bank.active == server.bundle_id and "late" not in str(server.joined())


def test_what_is_wrong_with_a_core_is_named_and_nothing_changes(server: Server) -> None:
    good = core_of(server.bundle)
    name = min(good.cores)
    o, i = server.bundle.shapes[name]
    nan = {**good.cores, name: torch.full_like(good.cores[name], float("nan"))}
    wide = {**good.cores, name: torch.zeros(3, 3)}
    less = {module: core for module, core in good.cores.items() if module != name}
    own = {name: LoraPair(torch.zeros(5, i), torch.zeros(o, 5))}
    cases = [
        (replace(good, cores=nan), 422, "holds NaN or Inf"),
        (replace(good, cores=wide), 422, "the core is (3, 3), the basis has room for"),
        (replace(good, cores=less), 422, "the basis has it, needed: a core for every module"),
        (replace(good, own=own), 422, "allowed: ranks 1 to 4"),
        (replace(good, basis_id="u-0000000000000000"), 409, "the core is told in basis 'u-0000000000000000'"),
        (replace(good, base_hash="f" * 64), 422, "base"),
        (core_of(server.bundle, size=1e30), 424, "not finite"),
    ]
    for core, status, why in cases:
        answer = server.join(core, user="dora")
        assert (answer.status_code, why in answer.json()["error"]) == (status, True), answer.text
    body = server.tar(good)
    for query, status, why in [
        ({"user": "a/b"}, 422, "allowed: 1 to 128"),
        ({}, 422, "allowed: 1 to 128"),
        ({"user": "dora", "replace": "yes"}, 422, "allowed: true, false"),
    ]:
        answer = server.post(body, **query)  # type: ignore[arg-type]
        assert answer.status_code == status and why in answer.json()["error"]
    for bad, status in [(b"no tar" * 200, 422), (b"", 422), (body + b"\0" * (4 << 20), 413)]:
        assert server.post(bad, user="dora").status_code == status
    assert server.post(packed_with(server, good, {"x": "y"}), user="dora").status_code == 422
    assert server.http.get("/soppu/v1/basis?cluster=1", headers=TOKEN).status_code == 422
    assert server.http.get("/soppu/v1/joined/7", headers=TOKEN).status_code == 404
    assert server.http.get("/soppu/v1/joined/x", headers=TOKEN).status_code == 422
    assert server.state.bank.active == server.bundle_id and list(server.state.bank.bundles()) == [
        server.bundle_id
    ]
    assert server.joined() == [] and not list(server.state.incoming.iterdir())
    server.state.activate("")
    assert server.join(good, user="dora").status_code == 409


def packed_with(server: Server, core: CoreAdapter, metrics: dict[str, Any]) -> bytes:
    server.tar(core)
    return packed(server.root / "cores" / core.id, metrics=json.loads(json.dumps(metrics)))


@pytest.mark.parametrize("at", ["add_bundle", "activate", "after"])
def test_a_server_that_is_killed_at_a_join_has_it_or_has_it_not(
    server: Server, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    class Killed(BaseException): ...

    def killed(*_: object, **__: object) -> None:
        raise Killed

    core = core_of(server.bundle)
    if at == "after":
        monkeypatch.setattr("soppu.serve.bank.newcomers.Newcomers._drop_passed", killed)
    else:
        monkeypatch.setattr(server.state, at, killed)
    server.tar(core)
    with pytest.raises(Killed):
        Newcomers(lambda: server.state).take(Asked("dora", server.root / "cores" / core.id))
    monkeypatch.undo()
    server.stop()
    server.start()
    assert (server.joined() != []) == (at != "add_bundle")  # once it was probed it is kept
    answer = server.join(core, user="dora")
    assert answer.status_code == (200 if at == "after" else 201)
    assert [one["user"] for one in server.joined()] == ["dora"] and server.text("dora") != server.text("")
