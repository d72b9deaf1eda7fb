"""Losses measured where the text is: a node has its own user's adapters and no others, numbers come back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord

from clients.workbench import workbench
from server.federation import SHARED_FOLDER, Federation
from soppu import config as configuration
from soppu.compress import CompressOptions, compress
from soppu.config import Config
from soppu.federation import members, wire
from soppu.federation.train import mean_loss
from tests.server.grid import InProcessGrid

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

USERS = {"alice": 12, "bob": 9, "carol": 10}
MEMBERS = {100 + n: user for n, user in enumerate(USERS)}
COLUMNS = ("base", "shared", "personal", "compressed")


@dataclass(frozen=True)
class Trained:
    """A federation that has ended, its bundle, and where it was."""

    config: Config
    nodes: list[dict[str, Any]]
    folder: Path
    federation: Federation
    bundle_id: str

    def measured(
        self, name: str, grid: InProcessGrid, *, members: Mapping[int, str] = MEMBERS
    ) -> dict[str, Any]:
        """The result of the other task, in a work folder of its own."""
        work = self.folder / name
        work.mkdir()
        adapters = self.federation.adapters
        order = {
            "bundle": self.bundle_id,
            "adapters": adapters,
            "compressed": [user for user in adapters if user != "bob"],  # bob is served the base model
            "shared": str(self.folder / "work" / SHARED_FOLDER),
            "federation": str(self.folder / "work"),
        }
        (work / "order.json").write_text(json.dumps(order))
        workbench.cache_clear()
        Federation(self.config, work, members=members).measure(grid)
        return dict(json.loads((work / "result.json").read_text()))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    write_users: Callable[[Path, Mapping[str, int]], Path],
    flower_identity: None,
) -> Trained:
    folder = tmp_path_factory.mktemp("evaluation")
    nodes = []
    for user, count in USERS.items():
        source = write_users(folder / "nodes" / user, {user: count})
        own = {"user-id": user, "data-source": str(source), "base-model": str(tiny_base)}
        nodes.append({**own, "model-cache": str(folder / "models")})
    public = write_users(folder / "public", {"nobody": 5})
    members.write(folder / "members.toml", MEMBERS)
    config = configuration.from_dict(
        {
            "base": {"model": str(tiny_base)},
            "data": {"users": list(USERS), "train_examples": 6, "min_examples": 4, "max_tokens": 48},
            "plan": {"adapter_layers": 2, "drop_ratio": 0.34},
            "lora": {"rank": 2, "alpha": 4},
            "align": {"source": str(public), "warmup_steps": 4, "round_steps": 1, "rank": 2},
            "federation": {
                "connection": "ours",
                "members": str(folder / "members.toml"),
                "rounds": 1,
                "local_steps": 2,
                "personal_steps": 3,
                "batch_size": 2,
            },
            "registry": {"root": str(folder / "registry")},
        }
    )
    workbench.cache_clear()
    federation = Federation(config, folder / "work", members=MEMBERS)
    federation.run(InProcessGrid(nodes))
    registry = federation.registry
    adapters = {user: registry.get_adapter(held) for user, held in federation.adapters.items()}
    frozen = registry.freeze_current(adapters["alice"].base)
    bundle = compress(adapters, CompressOptions(method="svd", ratio=2.0), adapter_ids=federation.adapters)
    bundle_id = registry.put_bundle(bundle.to_bytes(), set_id=frozen)
    return Trained(config, nodes, folder, federation, bundle_id)


def test_every_user_is_measured_in_every_column(trained: Trained) -> None:
    grid = InProcessGrid(trained.nodes)
    found = trained.measured("all", grid)
    assert found["refused"] == {}
    assert set(found["losses"]) == set(USERS)
    for user, one in found["losses"].items():
        columns = [name for name in COLUMNS if (user, name) != ("bob", "compressed")]
        assert set(one) == {"num-examples", *(f"loss-{name}" for name in columns)}
        assert len(set(one.values())) == len(one)


def test_the_numbers_are_those_of_the_emulator_on_the_users_own_text(trained: Trained) -> None:
    grid = InProcessGrid(trained.nodes)
    found = trained.measured("numbers", grid)["losses"]["carol"]
    bench = workbench.__wrapped__(_as_node(trained, "carol"), trained.federation.plan)
    bench.align(trained.federation.aligner.adapter())
    held = bench.heldout("carol")
    personal = trained.federation.registry.get_adapter(trained.federation.adapters["carol"])
    for name, adapter in (("base", None), ("personal", personal)):
        wanted = mean_loss(bench.top, bench.plan, held, adapter=adapter)
        assert math.isclose(found[f"loss-{name}"], wanted, rel_tol=0.02), name
    assert found["num-examples"] == len(held)


def _as_node(trained: Trained, user: str) -> Config:
    own = trained.nodes[list(USERS).index(user)]
    values = configuration.to_dict(trained.config)
    values["data"] = {**values["data"], "source": own["data-source"], "users": [user]}
    return configuration.from_dict(values)


def test_a_node_is_sent_its_own_users_adapters_and_no_others(trained: Trained) -> None:
    grid = InProcessGrid(trained.nodes)
    trained.measured("sent", grid)
    registry, adapters = trained.federation.registry, trained.federation.adapters
    sent = {
        m.metadata.dst_node_id: m.content["arrays"].to_torch_state_dict() for m in grid.of_type("evaluate")
    }
    assert set(sent) == set(MEMBERS)
    for node, user in MEMBERS.items():
        columns = {"emulator", "shared", "personal", *(["compressed"] if user != "bob" else [])}
        assert {name.split("/")[0] for name in sent[node]} == columns
        own = wire.to_state(registry.get_adapter(adapters[user]), prefix="personal/")
        for name, tensor in own.items():
            assert torch.equal(sent[node][name], tensor), (user, name)
    said = str([message.content["config"]["settings"] for message in grid.sent])
    assert not [user for user in USERS if user in said]


def test_who_has_no_node_or_is_no_member_is_left_out(trained: Trained) -> None:
    grid = InProcessGrid(trained.nodes)
    found = trained.measured("strangers", grid, members={101: "bob", 102: "nobody-of-ours"})
    assert set(found["losses"]) == {"bob"}
    assert {m.metadata.dst_node_id for m in grid.of_type("evaluate")} == {101}


def test_what_comes_back_is_checked_and_refused_by_name(trained: Trained) -> None:
    def tamper(message: Message, reply: Message) -> Message | None:
        user = MEMBERS[message.metadata.dst_node_id]
        if user == "alice":
            return None
        if user == "bob":
            reply.content["who"]["user"] = "alice"
        else:
            numbers = dict(reply.content["metrics"])
            reply.content["metrics"] = MetricRecord({**numbers, "loss-personal": float("nan")})
        return reply

    found = trained.measured("tampered", InProcessGrid(trained.nodes, tamper=tamper))
    assert found["losses"] == {}
    assert "gave no answer" in found["refused"]["alice"]
    assert "'alice'" in found["refused"]["bob"]
    assert "loss-personal is nan" in found["refused"]["carol"]


@pytest.mark.parametrize("count", [0, 17, 1e12])
def test_nobody_says_they_measured_on_more_than_there_may_be(trained: Trained, count: float) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if reply.has_content():
            reply.content["metrics"]["num-examples"] = count
        return reply

    found = trained.measured(f"counts-{count:g}", InProcessGrid(trained.nodes[:1], tamper=tamper))
    assert "num-examples" in found["refused"]["alice"]


def test_a_node_of_another_name_measures_nothing(trained: Trained) -> None:
    """Its own settings say that it is somebody else: what it answers is not taken for its user's."""
    nodes = [{**trained.nodes[0], "user-id": "bob", "data-source": trained.nodes[1]["data-source"]}]
    found = trained.measured("claimed", InProcessGrid(nodes))
    assert "'bob'" in found["refused"]["alice"] and found["losses"] == {}
