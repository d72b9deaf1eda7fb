"""A cohort that learns a basis, in one process: what is averaged, who is refused, where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from clients.workbench import workbench
from server.app import main
from server.basis_federation import BasisFederation
from server.patience import has_stalled
from soppu.config import Config
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis, drawn, orthonormal
from soppu.errors import FederationError
from soppu.federation import simulation, wire, wire_basis
from tests.server.grid import InProcessGrid, context
from tests.server.test_federation import NODES, USERS, Killed, WriteUsers, builder, result

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

Tamper = Callable[[Message, Message], Message | None]
Given = Callable[..., Config]


@pytest.fixture
def given(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Given:
    def make(**federation: Any) -> Config:
        learnt = {"basis_of": "learnt", "basis_modules": ["down_proj"], "basis_rank": 3, "mode": "shared"}
        steps = {"rounds": 1, "basis_rounds": 2, "basis_steps": 3, "basis_learning_rate": 1e-2}
        told = {**learnt, **steps, **federation}
        return builder(tmp_path, tiny_base, write_users)(federation=told, align={"warmup_steps": 1})

    return make


def run(config: Config, workdir: Path, *, tamper: Tamper | None = None) -> InProcessGrid:
    workbench.cache_clear()
    torch.set_num_threads(1)
    grid = InProcessGrid(NODES, tamper=tamper)
    BasisFederation(config, workdir).run(grid)
    return grid


def directions(workdir: Path) -> CoreBasis:
    return basis_file.read(workdir / result(workdir)["directions"])


def sent(grid: InProcessGrid, number: int) -> dict[str, Tensor]:
    """U and V as they went down in a basis round, from 0."""
    message = grid.of_type("train.basis")[number * len(USERS)]
    return wire.split_state(message.content.array_records["arrays"].to_torch_state_dict())[0]


def trained(grid: InProcessGrid) -> list[Message]:
    """The replies to basis rounds, which come after a shared round and the personal one."""
    return [m for m in grid.replies if "who" in m.content][2 * len(USERS) :]


def came(grid: InProcessGrid, number: int) -> list[tuple[dict[str, Tensor], int]]:
    """What came back in it: tensors, and of how many examples."""
    replies = trained(grid)[number * len(USERS) : (number + 1) * len(USERS)]
    return [
        (m.content["arrays"].to_torch_state_dict(), m.content["metrics"]["num-examples"])  # type: ignore[union-attr,index,call-overload]
        for m in replies
    ]


# ---- what is averaged


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_a_round_is_the_mean_of_what_users_made_of_the_basis_taken_so_many_times(
    given: Given, tmp_path: Path, rate: float
) -> None:
    config = given(basis_server_learning_rate=rate)
    grid = run(config, tmp_path / "work")
    found = directions(tmp_path / "work")
    like = CoreBasis({})
    first = wire_basis.from_state(sent(grid, 0), like)
    shapes = first.module_shapes()
    assert first.tensors().keys() == drawn(shapes, 3, seed=config.seed).tensors().keys()
    assert all(name.endswith("down_proj") for name in shapes)
    for number, after in enumerate((sent(grid, 1), wire_basis.to_state(found))):
        replies = came(grid, number)
        total = sum(examples for _, examples in replies)
        mean = {
            name: sum(state[name].double() * (examples / total) for state, examples in replies)
            for name in sent(grid, number)
        }
        begun = sent(grid, number)
        taken = {n: (begun[n] + rate * (t - begun[n])).float() for n, t in mean.items()}
        wanted = orthonormal(wire_basis.from_state(taken, like))
        for name, tensor in wire_basis.to_state(wanted).items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
        for state, _ in replies:  # everybody has moved it, and nobody by as much as a core begins with
            moved = max(
                float((state[name] - before).abs().max()) for name, before in sent(grid, number).items()
            )
            assert 1e-3 < moved < 0.1
    for message in grid.of_type("train.basis"):  # beside what all share, which is told after its rounds
        shared = message.content.array_records["shared"].to_torch_state_dict()
        assert any(float(tensor.abs().max()) > 0 for name, tensor in shared.items() if "lora_B" in name)
    rounds = result(tmp_path / "work")["rounds"]
    assert [(one["mode"], one["round"]) for one in rounds] == [
        ("shared", 1),
        ("personal", 2),
        ("basis", 3),
        ("basis", 4),
    ]
    down = sum(r.count_bytes() for m in grid.of_type("train.basis") for r in m.content.values())
    assert sum(one["bytes_down"] for one in rounds[2:]) == down


def test_cores_are_trained_beside_the_shared_adapter(given: Given, tmp_path: Path) -> None:
    """One that hardly moves leaves that adapter's loss, which is not the base model's."""
    still = given(basis_core_learning_rate=1e-9, basis_learning_rate=1e-9, local_steps=8, learning_rate=1e-2)
    grid = run(still, tmp_path / "work")
    metrics = [m.content.metric_records["metrics"] for m in trained(grid)]
    assert len(metrics) == 2 * len(USERS)
    for told in metrics:
        assert told["emulator-loss"] == pytest.approx(told["emulator-loss-shared"], abs=1e-5)
        assert told["emulator-loss"] != pytest.approx(told["emulator-loss-base"], abs=1e-3)


def test_what_a_user_trains_to_get_there_stays_where_it_is(given: Given, tmp_path: Path) -> None:
    grid = run(given(), tmp_path / "work")
    for state, _ in came(grid, 0):
        assert state.keys() == sent(grid, 0).keys()  # U and V of the projections named, and no core


# ---- an attempt that was killed


class Dies:
    """Lets so many replies to basis rounds through, then the process is gone."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train.basis":
            self.left -= 1
            if self.left < 0:
                raise Killed
        return reply


@pytest.mark.parametrize("after", [0, 4])
def test_a_killed_attempt_goes_on_to_the_same_directions(given: Given, tmp_path: Path, after: int) -> None:
    config = given()
    with pytest.raises(Killed):
        run(config, tmp_path / "work", tamper=Dies(after))
    again = run(config, tmp_path / "work")
    assert len(again.of_type("train.basis")) == len(USERS) * (2 - after // len(USERS))
    run(config, tmp_path / "whole")
    assert directions(tmp_path / "work").id == directions(tmp_path / "whole").id


def test_what_was_learnt_with_other_settings_is_not_gone_on_with(given: Given, tmp_path: Path) -> None:
    run(given(basis_steps=2), tmp_path / "work")
    run(given(), tmp_path / "work")
    run(given(), tmp_path / "other")
    assert directions(tmp_path / "work").id == directions(tmp_path / "other").id


# ---- whom nobody trusts


def only_in_basis_rounds(user: str, change: Callable[[Message], Message | None]) -> Tamper:
    def tamper(message: Message, reply: Message) -> Message | None:
        ours = message.metadata.message_type == "train.basis" and message.content["config"]["user"] == user
        return change(reply) if ours else reply

    return tamper


def arrays(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Message], Message]:
    def changed(reply: Message) -> Message:
        state = reply.content.array_records["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord(dict(change(state)))
        return reply

    return changed


def who(**said: str) -> Callable[[Message], Message]:
    def changed(reply: Message) -> Message:
        reply.content["who"].update(said)  # type: ignore[union-attr,call-arg]
        return reply

    return changed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (arrays(lambda s: {n: t * torch.nan for n, t in s.items()}), "holds NaN or Inf"),
        (arrays(lambda s: dict(list(s.items())[1:])), "is missing"),
        (arrays(lambda s: {**s, "model.layers.0.more": torch.ones(1)}), "is not part of the plan"),
        (arrays(lambda s: {n: t[:, :2] for n, t in s.items()}), "the plan says"),
        (arrays(lambda s: {n: t + 50 for n, t in s.items()}), "changed the adapter by"),
        (who(form="ternary"), "sent in the form 'ternary', allowed here: float32"),
        (who(user="carol"), "says it is from 'carol'"),
    ],
)
def test_a_damaged_reply_is_refused_by_name_and_the_round_goes_on(
    given: Given, tmp_path: Path, change: Callable[[Message], Message], why: str
) -> None:
    run(given(basis_rounds=1), tmp_path / "work", tamper=only_in_basis_rounds("bob", change))
    *_, log = result(tmp_path / "work")["rounds"]
    assert log["accepted"] == ["alice", "carol"] and why in log["refused"]["bob"]
    assert log["refused"]["bob"].startswith("bob: ")
    directions(tmp_path / "work")


def test_a_round_that_most_are_lost_in_is_not_averaged_and_the_next_attempt_repeats_it(
    given: Given, tmp_path: Path
) -> None:
    config = given()

    def silent(message: Message, reply: Message) -> Message | None:
        basis = message.metadata.message_type == "train.basis"
        return None if basis and message.content["config"]["user"] != "alice" else reply

    with pytest.raises(FederationError, match="1 of 3 users answered"):
        run(config, tmp_path / "work", tamper=silent)
    assert len(run(config, tmp_path / "work").of_type("train.basis")) == 6


def test_the_median_of_the_bases_is_taken_where_means_are_robust(given: Given, tmp_path: Path) -> None:
    apart = arrays(lambda s: {n: t + 50 for n, t in s.items()})
    once = {"basis_rounds": 1, "max_update": 1e9, "basis_server_learning_rate": 1.0}
    wide = given(robust="median", **once)
    run(wide, tmp_path / "with", tamper=only_in_basis_rounds("bob", apart))
    run(wide, tmp_path / "without")
    for name, tensor in directions(tmp_path / "with").tensors().items():
        assert float((tensor - directions(tmp_path / "without").tensors()[name]).abs().max()) < 0.05
    mean = given(**once)
    run(mean, tmp_path / "mean", tamper=only_in_basis_rounds("bob", apart))
    some = next(iter(directions(tmp_path / "mean").tensors().values()))
    assert float((some - next(iter(directions(tmp_path / "without").tensors().values()))).abs().max()) > 0.05


def test_noise_comes_upon_a_basis_before_it_leaves_and_every_round_is_counted(
    given: Given, tmp_path: Path
) -> None:
    noisy = {"dp_at": "client", "dp_clip": 0.5, "dp_noise": 1.0}
    grid = run(given(**noisy), tmp_path / "work")
    moved = [
        float(sum((state[name] - before).square().sum() for name, before in sent(grid, 0).items())) ** 0.5
        for state, _ in came(grid, 0)
    ]
    plain = run(given(), tmp_path / "plain")
    quiet = [
        float(sum((state[name] - before).square().sum() for name, before in sent(plain, 0).items())) ** 0.5
        for state, _ in came(plain, 0)
    ]
    assert min(moved) > 2 * max(quiet)
    told = result(tmp_path / "work")["privacy"]
    assert told["releases"] == 1 + 2 and told["at"] == "client"  # shared rounds and those of the basis


# ---- when it is over


def test_rounds_end_when_users_losses_have_stopped_falling(given: Given, tmp_path: Path) -> None:
    def stalls(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train.basis":
            reply.content["metrics"]["emulator-loss"] = 3.0  # type: ignore[index,call-overload]
        return reply

    run(given(basis_rounds=6, patience=2), tmp_path / "work", tamper=stalls)
    assert [one["mode"] for one in result(tmp_path / "work")["rounds"]].count("basis") == 3
    assert has_stalled([3.0, 3.0], 1) and not has_stalled([3.0, 2.9], 1) and not has_stalled([], 1)


def test_a_task_that_there_is_none_of_is_an_error(given: Given, tmp_path: Path) -> None:
    here = context(1)
    (tmp_path / "run.toml").write_text("")
    here.run_config = {"config": str(tmp_path / "run.toml"), "workdir": str(tmp_path), "task": "learn"}
    allowed = ", ".join((simulation.FEDERATE, simulation.LEARN, simulation.EVALUATE))
    with pytest.raises(FederationError, match=f"task = 'learn', allowed: {allowed}"):
        main(InProcessGrid(NODES), here)
