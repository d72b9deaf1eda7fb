"""A whole federation in one process: hello, alignment, rounds, personal adapters; killed and resumed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from clients.workbench import workbench
from server import checkpoint as checkpoints
from server.app import main
from server.federation import CLIENT_SECTIONS, Federation
from soppu import config as configuration
from soppu import data, files, models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.errors import FederationError
from soppu.federation import wire, wire_ternary
from soppu.federation.attach import attached
from soppu.registry import Registry
from tests.server.grid import InProcessGrid, context
from tests.thorough import thorough

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]

USERS = {"alice": 12, "bob": 9, "carol": 10}
TRAINED = {"alice": 6, "bob": 6, "carol": 6}
NODES = [{"partition-id": n} for n in range(len(USERS))]


class Killed(BaseException):
    """The process died: nothing in between may catch this."""


WriteUsers = Callable[[Path, Mapping[str, int]], Path]
Build = Callable[..., Config]


def builder(root: Path, base: Path, write_users: WriteUsers) -> Build:
    """`build(federation={"rounds": 1})`: a small run below `root`; the sections given are merged in."""
    source = write_users(root / "users", USERS)
    public = write_users(root / "public", {"nobody": 5})

    def build(**changes: dict[str, Any]) -> Config:
        amounts = {"train_examples": 6, "heldout_examples": 2, "min_examples": 4, "max_tokens": 48}
        steps = {"rounds": 2, "local_steps": 2, "personal_steps": 3, "batch_size": 2, "hello_timeout_s": 1}
        aligning = {"warmup_steps": 8, "round_steps": 2, "rank": 2, "learning_rate": 3e-3}
        sections: dict[str, dict[str, Any]] = {
            "base": {"model": str(base)},
            "data": {"source": str(source), "users": list(USERS), **amounts},
            "plan": {"adapter_layers": 2, "drop_ratio": 0.34},
            "lora": {"rank": 2, "alpha": 4},
            "align": {"source": str(public), **aligning},
            "federation": steps,
            "registry": {"root": str(root / "registry")},
        }
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values}
        return configuration.from_dict(sections)

    return build


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Build:
    return builder(tmp_path, tiny_base, write_users)


@dataclass(frozen=True)
class Finished:
    """A run that has ended, for tests that only look at it."""

    config: Config
    workdir: Path
    grid: InProcessGrid
    federation: Federation

    @property
    def replies(self) -> list[Message]:
        """To training, in the order of the rounds."""
        return [message for message in self.grid.replies if "who" in message.content]


def finished(root: Path, config: Config) -> Finished:
    workbench.cache_clear()
    torch.set_num_threads(1)  # as in the tests that are held against it: sums depend on how they are split
    return Finished(config, root / "work", *federate(config, root / "work"))


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


def federate(
    config: Config, workdir: Path, grid: InProcessGrid | None = None
) -> tuple[InProcessGrid, Federation]:
    grid = grid or InProcessGrid(NODES)
    federation = Federation(config, workdir)
    federation.run(grid)
    return grid, federation


def result(workdir: Path) -> dict[str, Any]:
    return dict(json.loads((workdir / "result.json").read_text()))


def user_of(message: Message) -> str:
    return list(USERS)[message.metadata.dst_node_id - 100]


def round_of(message: Message) -> int:
    return int(message.content["config"]["server-round"])


def stored(config: Config, workdir: Path) -> dict[str, LoraAdapter]:
    registry = Registry.open(config.registry.root)
    return {user: registry.get_adapter(held) for user, held in result(workdir)["adapters"].items()}


def shared_state(message: Message) -> dict[str, Tensor]:
    return wire.split_state(message.content["arrays"].to_torch_state_dict())[0]


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


# ---- users who fail


def test_a_poisoned_reply_is_refused_and_the_others_get_their_adapters(config: Build, tmp_path: Path) -> None:
    def poison(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and user_of(asked) == "bob":
            state = reply.content["arrays"].to_torch_state_dict()
            next(iter(state.values()))[0, 0] = math.nan
            reply.content["arrays"] = ArrayRecord(state)
        return reply

    federate(config(), tmp_path / "work", InProcessGrid(NODES, tamper=poison))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "carol"}
    assert "bob: " in found["refused"]["bob"] and "NaN" in found["refused"]["bob"]
    assert all(list(log["refused"]) == ["bob"] for log in found["rounds"])
    assert all(
        bool(torch.isfinite(side).all())
        for adapter in stored(config(), tmp_path / "work").values()
        for pair in adapter.pairs.values()
        for side in (pair.A, pair.B)
    )


def test_a_user_who_is_silent_in_the_last_round_has_no_adapter(config: Build, tmp_path: Path) -> None:
    def silent(asked: Message, reply: Message) -> Message | None:
        last = asked.metadata.message_type == "train" and round_of(asked) == 3
        return None if last and user_of(asked) == "carol" else reply

    with pytest.raises(FederationError, match="1 users sent no adapter: carol: no answer in time"):
        federate(config(), tmp_path / "work", InProcessGrid(NODES, tamper=silent))
    assert not (tmp_path / "work" / "result.json").exists()
    allowed = config(federation={"min_users": 2})
    federate(allowed, tmp_path / "work", InProcessGrid(NODES, tamper=silent))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "bob"}
    assert found["refused"] == {"carol": "carol: no answer in time"}
    assert found["rounds"][0]["refused"] == {}


def test_a_user_without_enough_text_is_named_and_left_out(config: Build, tmp_path: Path) -> None:
    short = {"min_examples": 8, "train_examples": 9}  # bob has nine, two of them held out
    with pytest.raises(FederationError, match="federation.min_users is 0, which wants everybody; .*bob"):
        federate(config(data=short), tmp_path / "work")
    assert not (tmp_path / "work" / "result.json").exists()
    grid, _ = federate(config(data=short, federation={"min_users": 2}), tmp_path / "work")
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "carol"}
    assert "user 'bob' has 7 examples to train on" in found["refused"]["bob"]
    assert {m.metadata.dst_node_id for m in grid.of_type("train")} == {100, 102}


def test_too_few_users_are_an_error_that_says_why(config: Build, tmp_path: Path) -> None:
    run = config(data={"min_examples": 8, "train_examples": 9}, federation={"min_users": 3})
    with pytest.raises(FederationError, match=r"2 users can train, federation.min_users is 3; .*bob"):
        federate(run, tmp_path / "work")
    assert not (tmp_path / "work" / "result.json").exists()


def test_too_few_adapters_are_an_error_that_says_why(config: Build, tmp_path: Path) -> None:
    def fail(asked: Message, reply: Message) -> Message | None:
        return None if asked.metadata.message_type == "train" else reply

    with pytest.raises(FederationError, match=r"0 adapters came back, .*no answer in time"):
        few = config(federation={"rounds": 0, "min_users": 1})
        federate(few, tmp_path / "work", InProcessGrid(NODES, tamper=fail))
    assert not (tmp_path / "work" / "result.json").exists()


def test_nodes_that_do_not_come_are_an_error(config: Build, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="1 of 3 nodes came within 1 s"):
        federate(config(), tmp_path / "work", InProcessGrid(NODES[:1]))


def test_a_client_hears_of_its_own_user_alone(plain: Finished) -> None:
    for message in plain.grid.sent:
        order = message.content["config"]
        assert order["user"] == user_of(message)
        settings = json.loads(order["settings"])
        assert "users" not in settings["data"]
        others = set(USERS) - {user_of(message)}
        text = json.dumps({name: str(value) for name, value in order.items()})
        assert not [user for user in others if user in text]


def test_a_user_who_was_not_there_at_hello_trains_from_the_next_round_on(
    config: Build, tmp_path: Path
) -> None:
    asked_carol: list[Message] = []

    def late(asked: Message, reply: Message) -> Message | None:
        if user_of(asked) == "carol" and asked.metadata.message_type == "query.hello":
            asked_carol.append(asked)
            return None if len(asked_carol) <= 4 else reply
        return reply

    federate(config(federation={"min_users": 2}), tmp_path / "work", InProcessGrid(NODES, tamper=late))
    found = result(tmp_path / "work")
    assert found["adapters"].keys() == {"alice", "bob", "carol"}
    assert [sorted(log["accepted"]) for log in found["rounds"]] == [
        ["alice", "bob"],
        ["alice", "bob", "carol"],
        ["alice", "bob", "carol"],
    ]
    assert found["refused"] == {}


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


def test_warming_up_is_not_done_twice(config: Build, tmp_path: Path) -> None:
    first = Federation(config(), tmp_path / "work")
    first.warm_up()
    second = Federation(config(), tmp_path / "work")
    second.warm_up()
    assert second.state.done == 0
    assert second.state.notes == first.state.notes
    assert second.aligner.adapter().content_hash() == first.aligner.adapter().content_hash()
    ours, theirs = first.aligner.state(), second.aligner.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"alpha": 8}},
        {"federation": {"wire": "ternary"}},
        *thorough(
            {"plan": {"drop_ratio": 0.2}},
            {"federation": {"local_steps": 3}},
            {"data": {"max_tokens": 40}},
            {"align": {"kl_weight": 0.0}},
        ),
    ],
    ids=["lora", "wire", "plan", "federation", "data", "align"],
)
def test_a_checkpoint_of_other_settings_is_not_used(
    config: Build, tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    Federation(config(), tmp_path / "work").warm_up()
    assert Federation(config(), tmp_path / "work").state.done == 0
    assert Federation(config(**changes), tmp_path / "work").state.done == -1


@pytest.mark.parametrize("changes", [{"seed": 1}, {"frozen_dtype": "bfloat16"}])
def test_seed_and_precision_are_settings_too(config: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    federation = Federation(config(), tmp_path / "work")
    federation.warm_up()
    assert Federation(config(), tmp_path / "work").state.done == 0
    other = configuration.from_dict(configuration.to_dict(config()) | changes)
    assert Federation(other, tmp_path / "work").state.done == -1


def test_what_is_served_later_does_not_change_the_federation(config: Build, tmp_path: Path) -> None:
    federation = Federation(config(), tmp_path / "work")
    federation.warm_up()
    later = config(serve={"max_batch": 2}, compress={"rank": 4}, gate={"min_mean_gain_kept": 0.1})
    assert Federation(later, tmp_path / "work").state.done == 0


# ---- the server's own text


def test_the_server_reads_public_text_only(config: Build, tmp_path: Path) -> None:
    """With the users' files gone before the server starts, it gets as far as asking them."""
    run = config()
    for path in (tmp_path / "users").iterdir():
        path.unlink()
    federation = Federation(run, tmp_path / "work")
    federation.warm_up()
    public = data.load_public(run.align.source, limit=99)
    assert len(federation._public) + len(federation._unseen) == len(public) == 5
    assert federation._public and federation._unseen  # what it trains on, and what it measures with
    with pytest.raises(FederationError, match="0 users can train"):
        federation.run(InProcessGrid(NODES))
