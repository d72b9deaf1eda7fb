"""A whole federation in one process: hello, alignment, rounds, personal adapters; killed and resumed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from transformers import PreTrainedModel

from clients.workbench import workbench
from server import checkpoint as checkpoints
from server.app import main
from server.federation import CLIENT_SECTIONS
from soppu import config as configuration
from soppu import files, models
from soppu.config import Config
from soppu.federation import wire, wire_ternary
from soppu.federation.attach import attached
from soppu.registry import Registry
from tests.server.grid import InProcessGrid, context
from tests.server.small_run import (
    NODES,
    USERS,
    Build,
    Finished,
    Killed,
    WriteUsers,
    builder,
    config,
    federate,
    finished,
    result,
    round_of,
    shared_state,
    stored,
    user_of,
)

__all__ = ["config"]
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, write_users: WriteUsers, flower_identity: None
) -> Finished:
    root = tmp_path_factory.mktemp("plain")
    return finished(root, builder(root, tiny_base, write_users)())


@pytest.fixture(scope="module")
def steady(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, write_users: WriteUsers, flower_identity: None
) -> Finished:
    """The same without re-alignment between the rounds, users' own adapters as signs and gains."""
    root = tmp_path_factory.mktemp("steady")
    wires = {"wire": "ternary", "wire_density": 0.2, "wire_max_loss": 1.0}
    return finished(root, builder(root, tiny_base, write_users)(align={"round_steps": 0}, federation=wires))


# ---- the whole of it


def test_every_user_gets_an_adapter_of_their_own(
    plain: Finished, tiny_base: Path, tiny_llama: PreTrainedModel
) -> None:
    found = result(plain.workdir)
    assert found["adapters"].keys() == USERS.keys()
    assert len(set(found["adapters"].values())) == len(USERS)
    assert found["refused"] == {}
    assert found["plan"]["kept"] == [0, 1, 3, 5] and found["plan"]["adapter_layers"] == [6, 7]
    assert found["plan"]["hash"] == plain.federation.plan.hash
    assert found["align"]["after"]["l2"] < found["align"]["before"]["l2"]
    assert json.loads((plain.workdir / "progress.json").read_text()) == {"note": "done", "share": 1.0}
    registry = Registry.open(plain.config.registry.root)
    assert registry.current_set() == found["adapters"]

    personal = {str(m.content["who"]["user"]): m for m in plain.replies[-3:]}
    base = models.resolve(str(tiny_base), cache=plain.workdir)
    ids = torch.tensor([[5, 17, 200, 9]])
    for user, adapter in stored(plain.config, plain.workdir).items():
        sent = personal[user].content["arrays"].to_torch_state_dict()
        assert wire.to_state(adapter).keys() == sent.keys()
        assert all(torch.equal(tensor, sent[name]) for name, tensor in wire.to_state(adapter).items())
        assert (adapter.base_hash, adapter.base_model) == (base.hash, str(tiny_base))
        folder = Path(plain.config.registry.root, "adapters", found["adapters"][user])
        with attached(tiny_llama, adapter):
            expected = tiny_llama(ids).logits
        peft = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder).eval()
        torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_ternary_wire_ends_in_the_adapters_that_the_clients_compressed(
    plain: Finished, steady: Finished
) -> None:
    personal = {str(m.content["who"]["user"]): m for m in steady.replies[-3:]}
    for user, adapter in stored(steady.config, steady.workdir).items():
        sent = personal[user].content["arrays"].to_torch_state_dict()
        decoded = wire_ternary.from_ternary(
            sent,
            steady.federation.agreement.shapes,
            rank=2,
            who=user,
            base_hash=steady.federation.plan.base_hash,
        )
        assert adapter.content_hash() == decoded.content_hash()
        assert sent.keys() == {wire_ternary.SIGNS, wire_ternary.GAINS}
    *shared, last = result(steady.workdir)["rounds"]
    assert {one["form"] for log in shared for one in log["received"].values()} == {"float32"}
    assert {user: one["form"] for user, one in last["received"].items()} == dict.fromkeys(USERS, "ternary")
    assert all(one["loss_ternary"] - one["loss_float32"] <= 1.0 for one in last["received"].values())
    assert 3 * last["bytes_up"] < shared[-1]["bytes_up"] == result(plain.workdir)["rounds"][0]["bytes_up"]


def test_rounds_are_fedavg_and_the_last_is_personal(plain: Finished) -> None:
    asked = plain.grid.of_type("train")
    assert [(round_of(m), m.content["config"]["mode"]) for m in asked] == [
        *[(1, "shared")] * 3,
        *[(2, "shared")] * 3,
        *[(3, "personal")] * 3,
    ]
    for number in (1, 2):  # what round n + 1 starts from is the mean of round n, by examples
        answers = plain.replies[3 * (number - 1) : 3 * number]
        weights = [float(m.content["metrics"]["num-examples"]) for m in answers]
        states = [m.content["arrays"].to_torch_state_dict() for m in answers]
        for message in asked[3 * number : 3 * number + 3]:
            for name, tensor in shared_state(message).items():
                mean = sum((w * s[name] for w, s in zip(weights, states, strict=True)), torch.zeros(()))
                torch.testing.assert_close(tensor, mean / sum(weights), rtol=1e-5, atol=1e-7)


def test_all_start_from_the_same_a_and_from_no_change(plain: Finished) -> None:
    states = [shared_state(message) for message in plain.grid.of_type("train")[:3]]
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, other[name]) for other in states[1:])
        assert bool(tensor.any()) == (".lora_A." in name)


def emulators(grid: InProcessGrid) -> list[str]:
    """Which emulator was sent in each round."""
    states = [wire.split_state(m.content["arrays"].to_torch_state_dict())[1] for m in grid.of_type("train")]
    hashes = [wire.loose_from_state(state).content_hash() for state in states]
    assert hashes[::3] == hashes[1::3] == hashes[2::3]  # the same for all
    return hashes[::3]


def test_the_emulator_is_realigned_before_each_later_round(plain: Finished, steady: Finished) -> None:
    moving, still = emulators(plain.grid), emulators(steady.grid)
    assert len(set(moving)) == 3
    assert still == [moving[0]] * 3


def test_clients_are_told_only_what_they_need(config: Build, tmp_path: Path) -> None:
    run = config(
        serve={"canary_prompt": "sesame", "state": "/srv/where-it-is"},
        registry={"catalogue": f"sqlite:///{tmp_path}/who-holds-what.db"},
        federation={"rounds": 0},
    )
    grid, _ = federate(run, tmp_path / "work")
    for message in grid.sent:
        order = message.content["config"]
        assert set(json.loads(order["settings"])) == set(CLIENT_SECTIONS)
        text = json.dumps({name: str(value) for name, value in order.items()})
        for secret in (
            run.registry.root,
            "who-holds-what",
            "sesame",
            "where-it-is",
            run.align.source,
            "canary",
        ):
            assert secret not in text


def test_a_client_hears_of_its_own_user_alone(plain: Finished) -> None:
    for message in plain.grid.sent:
        order = message.content["config"]
        assert order["user"] == user_of(message)
        settings = json.loads(order["settings"])
        assert "users" not in settings["data"]
        others = set(USERS) - {user_of(message)}
        text = json.dumps({name: str(value) for name, value in order.items()})
        assert not [user for user in others if user in text]


def test_bytes_in_the_log_are_those_that_travelled(plain: Finished) -> None:
    def size(messages: list[Message]) -> int:
        return sum(record.count_bytes() for message in messages for record in message.content.values())

    rounds = result(plain.workdir)["rounds"]
    assert [log["round"] for log in rounds] == [1, 2, 3]
    for number, log in enumerate(rounds):
        part = slice(3 * number, 3 * number + 3)
        assert log["bytes_down"] == size(plain.grid.of_type("train")[part]) > 0
        assert log["bytes_up"] == size(plain.replies[part]) > 0
        assert math.isfinite(log["train_loss"]) and math.isfinite(log["emulator_loss"])
        assert sorted(log["accepted"]) == list(USERS)


def test_the_same_run_gives_the_same_adapters(plain: Finished, tmp_path: Path) -> None:
    again = configuration.from_dict(
        configuration.to_dict(plain.config) | {"registry": {"root": str(tmp_path / "registry")}}
    )
    federate(again, tmp_path / "work")
    assert result(tmp_path / "work")["adapters"] == result(plain.workdir)["adapters"]


def test_the_entry_point_reads_its_two_keys(config: Build, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    files.write_text(path, configuration.dump(config(federation={"rounds": 0})))
    here = context(1)
    here.run_config = {"config": str(path), "workdir": str(tmp_path / "work"), "task": "federate"}
    main(InProcessGrid(NODES), here)
    assert result(tmp_path / "work")["adapters"].keys() == USERS.keys()


# ---- killed and resumed


def killed_in(number: int, *, after: int = 0) -> Callable[[Message, Message], Message]:
    """A server that dies in round `number`, when `after` users have answered."""
    seen = []

    def tamper(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and round_of(asked) == number:
            seen.append(asked)
            if len(seen) > after:
                raise Killed
        return reply

    return tamper


def killed_run(config: Config, workdir: Path, *, number: int, after: int = 1) -> None:
    with pytest.raises(Killed):
        federate(config, workdir, InProcessGrid(NODES, tamper=killed_in(number, after=after)))
    assert not (workdir / "result.json").exists()
    workbench.cache_clear()  # the next attempt is another process


@pytest.mark.parametrize(
    ("uninterrupted", "number", "left"),
    [
        ("steady", 1, 9),
        pytest.param("steady", 2, 6, marks=pytest.mark.long),
        pytest.param("steady", 3, 3, marks=pytest.mark.long),
        pytest.param("plain", 2, 6, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_with_the_round_it_died_in_and_ends_the_same_to_the_bit(
    request: pytest.FixtureRequest, tmp_path: Path, uninterrupted: str, number: int, left: int
) -> None:
    """With re-alignment between the rounds too: its AdamW and its order of blocks go on where they were."""
    whole: Finished = request.getfixturevalue(uninterrupted)
    run = configuration.from_dict(
        configuration.to_dict(whole.config) | {"registry": {"root": str(tmp_path / "registry")}}
    )
    killed_run(run, tmp_path / "work", number=number)
    grid, _ = federate(run, tmp_path / "work")
    asked = grid.of_type("train")
    assert [round_of(m) for m in asked] == [n for n in (1, 2, 3) if n >= number for _ in USERS]
    assert len(asked) == left
    sent, first = (
        m.content["arrays"].to_torch_state_dict() for m in (asked[0], whole.grid.of_type("train")[-left])
    )
    assert sent.keys() == first.keys() and all(torch.equal(sent[name], first[name]) for name in sent)
    found, wanted = result(tmp_path / "work"), result(whole.workdir)
    assert found["adapters"] == wanted["adapters"]
    assert found["align"] == wanted["align"]
    assert len(found["rounds"]) == 3
    for ours, theirs in zip(found["rounds"], wanted["rounds"], strict=True):
        assert ours.pop("seconds") >= 0 and theirs.pop("seconds") >= 0
        assert ours == theirs


@pytest.mark.long
def test_a_run_that_is_killed_in_every_round_ends_the_same_to_the_bit(
    plain: Finished, tmp_path: Path
) -> None:
    run = configuration.from_dict(
        configuration.to_dict(plain.config) | {"registry": {"root": str(tmp_path / "registry")}}
    )
    for number in (1, 2, 3):
        killed_run(run, tmp_path / "work", number=number)
        key = json.loads((tmp_path / "work" / "checkpoint.json").read_text())["key"]
        assert checkpoints.load(tmp_path / "work", key=key).done == number - 1
    federate(run, tmp_path / "work")
    assert result(tmp_path / "work")["adapters"] == result(plain.workdir)["adapters"]
