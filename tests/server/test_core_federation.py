"""Cores in one process: every user's numbers inside a basis that is stored, sent once, and stays as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from server.app import main
from server.core_federation import CoreFederation
from server.federation import Federation
from soppu import adapter as peft_folder
from soppu import config as configuration
from soppu import files
from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import Config
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter
from soppu.cores.projecting import from_lora
from soppu.errors import FederationError
from soppu.federation import wire_core
from soppu.federation.attach import initial_pairs
from soppu.federation.chosen_basis import ChosenBasis
from soppu.registry import Registry
from tests.server.grid import InProcessGrid, context
from tests.server.small_run import USERS, Killed, builder, result

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

Tamper = Callable[[Message, Message], Message | None]


class Given:
    """A run of cores that is ready to begin: a basis is in the registry, and chosen."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.config = root, config
        self.registry = Registry.open(config.registry.root)
        self.basis, self.shared = drawn(Federation(config, root / "shapes"))
        self.registry.put_basis(self.basis)
        self.registry.put_start(self.basis.id, self.shared)

    def run(self, name: str = "work", *, nodes: int = 2, tamper: Tamper | None = None) -> InProcessGrid:
        """A run, or another attempt at the one of this name."""
        if not (self.root / name).exists():
            ChosenBasis(self.basis.id).write(self.root / name)
        grid = InProcessGrid([{"partition-id": n} for n in range(nodes)], tamper=tamper)
        CoreFederation(self.config, self.root / name).run(grid)
        return grid

    def cores(self, name: str = "work") -> dict[str, CoreAdapter]:
        held = result(self.root / name)["adapters"]
        return {user: self.registry.get_core(core_id) for user, core_id in held.items()}


def drawn(federation: Federation) -> tuple[CoreBasis, LoraAdapter]:
    """A basis of rank 4, and an adapter that lies in it."""
    draw = torch.Generator().manual_seed(3)
    agreed = federation.agreement
    sides = {
        name: (
            torch.linalg.qr(torch.randn(o, 4, generator=draw))[0],
            torch.linalg.qr(torch.randn(i, 4, generator=draw))[0],
        )
        for name, (o, i) in agreed.shapes.items()
    }
    pairs = {name: LoraPair(v.T[:2], 0.1 * u[:, :2]) for name, (u, v) in sides.items()}
    names = (agreed.base_model, agreed.base_hash)
    return CoreBasis(sides, *names), LoraAdapter(pairs, *names)


@pytest.fixture
def given(
    tmp_path: Path, tiny_base: Path, write_users: Callable[[Path, Mapping[str, int]], Path]
) -> Callable[..., Given]:
    def make(**federation: Any) -> Given:
        told = {"form": "core", "client_state": str(tmp_path / "clients"), **federation}
        align = {"warmup_steps": 1}
        return Given(tmp_path, builder(tmp_path, tiny_base, write_users)(federation=told, align=align))

    return make


def asked(grid: InProcessGrid) -> list[list[str]]:
    return [list(message.content["config"]["users"]) for message in grid.of_type("train.cores")]


def size(messages: list[Message]) -> int:
    return sum(record.count_bytes() for message in messages for record in message.content.values())


# ---- the whole of it


def test_everybody_trains_a_core_from_where_the_shared_adapter_lies(given: Callable[..., Given]) -> None:
    run = given(personal_steps=2)
    grid = run.run()
    found = result(run.root / "work")
    assert found["adapters"].keys() == USERS.keys() and found["refused"] == {}
    assert (found["form"], found["basis"]) == ("core", run.basis.id)
    start = from_lora(run.shared, run.basis).core
    for user, core in run.cores().items():
        assert core.basis_id == run.basis.id
        moved = max(float((core.cores[name] - start.cores[name]).abs().max()) for name in core.cores)
        assert 0 < moved < 0.1, user
    assert run.registry.current_set() == found["adapters"]
    shared = peft_folder.read(run.root / "work" / found["shared"])
    assert shared.content_hash() == run.shared.content_hash()
    (log,) = found["rounds"]
    trained = [message for message in grid.replies if any("arrays:" in name for name in message.content)]
    assert asked(grid) == [["alice", "bob"], ["carol"]]
    assert log["bytes_up"] == size(trained) == sum(one["bytes_up"] for one in log["received"].values())
    assert log["bytes_down"] == size(grid.of_type("train.cores"))
    assert log["mode"] == "personal" and math.isfinite(log["emulator_loss"]) and log["shared_loss"] > 0


@pytest.mark.long
def test_who_is_trained_beside_whom_decides_nothing(given: Callable[..., Given]) -> None:
    run = given(personal_steps=4, personal_check_every=2, personal_learning_rates=[1e-2, 3e-2], together=3)
    run.run("at-once", nodes=1)
    run.config = configuration.from_dict(
        {**(told := configuration.to_dict(run.config)), "federation": {**told["federation"], "together": 1}}
    )
    grid = run.run("one-by-one", nodes=2)
    assert asked(grid) == [["alice"], ["bob"], ["carol"]]
    many, one = run.cores("at-once"), run.cores("one-by-one")
    for user in USERS:
        for name, core in many[user].cores.items():
            torch.testing.assert_close(core, one[user].cores[name], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_the_basis_is_sent_to_a_node_that_lacks_it_and_never_again(given: Callable[..., Given]) -> None:
    run = given(personal_steps=1)
    first = run.run("first")
    assert [("basis" in message.content) for message in first.of_type("train.cores")] == [True, True]
    again = run.run("again")
    assert [("basis" in message.content) for message in again.of_type("train.cores")] == [False, False]
    (one,), (other,) = (result(run.root / name)["rounds"] for name in ("first", "again"))
    sent = 2 * len(files_of(run)[0].read_bytes())
    assert one["bytes_basis"] == one["bytes_down"] - other["bytes_down"] >= sent and other["bytes_basis"] == 0
    files_of(run)[0].write_bytes(b"torn")
    assert ["basis" in m.content for m in run.run("torn").of_type("train.cores")] == [True, True]
    assert run.cores("torn").keys() == USERS.keys()


def files_of(run: Given) -> list[Path]:
    return list(Path(run.config.federation.client_state, "bases").iterdir())


def test_ranks_of_their_own_travel_too_and_all_of_it_is_clipped_where_that_is_configured(
    given: Callable[..., Given],
) -> None:
    run = given(personal_steps=2, core_own_rank=1, dp_at="client", dp_clip=1e-3)
    run.run()
    begun = from_lora(run.shared, run.basis).core
    own = initial_pairs(run.basis.module_shapes(), rank=1, seed=run.config.seed)
    start = wire_core.to_state(replace(begun, own=own))[wire_core.NUMBERS]
    for core in run.cores().values():
        assert core.own.keys() == run.basis.sides.keys()
        assert any(bool(pair.B.any()) for pair in core.own.values())
        assert core.parameters() == wire_core.numbers(run.basis, own_rank=1)
        moved = wire_core.to_state(core)[wire_core.NUMBERS] - start
        assert 0 < float(moved.norm()) <= 1e-3 * 1.001
    assert result(run.root / "work")["privacy"]["releases"] == 1


# ---- users who fail


@pytest.mark.long
def test_one_who_crashes_the_client_costs_nobody_else_a_core(given: Callable[..., Given]) -> None:
    def crash(message: Message, reply: Message) -> Message:
        if "bob" in message.content["config"].get("users", ()):  # type: ignore[union-attr]
            return Message(Error(code=1, reason="out of memory"), reply_to=message)
        return reply

    run = given(personal_steps=1)
    with pytest.raises(FederationError, match="1 users sent no adapter: bob: the client crashed"):
        run.run(tamper=crash)
    grid = run.run()  # the next attempt
    assert asked(grid) == [["bob"]]
    assert run.cores().keys() == USERS.keys() and result(run.root / "work")["refused"] == {}


def test_a_killed_attempt_goes_on_with_those_who_have_no_core(given: Callable[..., Given]) -> None:
    run = given(personal_steps=1, together=1)
    calls: list[int] = []

    def kill(message: Message, reply: Message) -> Message:
        calls.append(message.metadata.message_type == "train.cores")
        if sum(calls) == 3:
            raise Killed
        return reply

    with pytest.raises(Killed):
        run.run(tamper=kill)
    assert asked(run.run()) == [["carol"]]
    assert len(result(run.root / "work")["rounds"][0]["received"]) == 3
    assert run.cores().keys() == USERS.keys()


def test_a_user_without_text_is_named(given: Callable[..., Given]) -> None:
    run = given(personal_steps=1)
    Path(run.config.data.source, "carol.jsonl").write_text("")
    run.run()
    found = result(run.root / "work")
    assert found["adapters"].keys() == {"alice", "bob"} and "could not train" in found["refused"]["carol"]


def test_a_node_of_its_own_trains_its_own_user(given: Callable[..., Given]) -> None:
    run = given(personal_steps=1)
    ChosenBasis(run.basis.id).write(run.root / "work")
    model, source = run.config.base.model, run.config.data.source
    own = [{"user-id": user, "data-source": f"{source}/{user}.jsonl", "base-model": model} for user in USERS]
    grid = InProcessGrid([{**node, "state-dir": str(run.root / node["user-id"])} for node in own])
    members = dict(zip((100, 101, 102), USERS, strict=True))
    CoreFederation(run.config, run.root / "work", members=members).run(grid)
    assert run.cores().keys() == USERS.keys()
    assert all((run.root / user / "bases").is_dir() for user in USERS)


def test_the_entry_point_trains_cores_where_the_configuration_says_so(given: Callable[..., Given]) -> None:
    run = given(personal_steps=1)
    path = run.root / "run.toml"
    files.write_text(path, configuration.dump(run.config))
    here = context(1)
    here.run_config = {"config": str(path), "workdir": str(run.root / "work"), "task": "federate"}
    with pytest.raises(FederationError, match="names no basis to train cores in"):
        main(InProcessGrid([{"partition-id": 0}]), here)
    ChosenBasis(run.basis.id).write(run.root / "work")
    main(InProcessGrid([{"partition-id": 0}]), here)
    assert json.loads((run.root / "work" / "progress.json").read_text()) == {"note": "done", "share": 1.0}
    assert run.cores().keys() == USERS.keys()
