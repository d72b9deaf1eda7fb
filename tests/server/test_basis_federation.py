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
from soppu.config import Config
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis, drawn, orthonormal
from soppu.errors import FederationError
from soppu.federation import simulation, wire, wire_basis
from tests.server.grid import InProcessGrid, context
from tests.server.small_run import NODES, USERS, Killed, WriteUsers, builder, result

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")

Tamper = Callable[[Message, Message], Message | None]
Given = Callable[..., Config]


@pytest.fixture
def given(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Given:
    def make(**federation: Any) -> Config:
        learnt = {"basis_of": "learnt", "basis_modules": ["down_proj"], "basis_rank": 3, "mode": "shared"}
        steps = {"rounds": 1, "basis_rounds": 2, "basis_steps": 3, "basis_learning_rate": 1e-2}
        told = {**learnt, **steps, "client_state": str(tmp_path / "clients"), **federation}
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
    """The replies to basis rounds, which come last."""
    return [m for m in grid.replies if "who" in m.content][-len(grid.of_type("train.basis")) :]


def came(grid: InProcessGrid, number: int) -> list[tuple[dict[str, Tensor], int]]:
    """What came back in it: tensors, and of how many examples."""
    replies = trained(grid)[number * len(USERS) : (number + 1) * len(USERS)]
    return [
        (m.content["arrays"].to_torch_state_dict(), m.content["metrics"]["num-examples"])  # type: ignore[union-attr,index,call-overload]
        for m in replies
    ]


# ---- what is averaged


def test_a_step_is_adams_with_the_mean_of_users_gradients(given: Given, tmp_path: Path) -> None:
    config = given(basis_rounds=3)
    grid = run(config, tmp_path / "work")
    ended = wire_basis.to_state(directions(tmp_path / "work").sides)
    names = list(sent(grid, 0))
    shapes = CoreBasis(wire_basis.from_state(sent(grid, 0))).module_shapes()
    assert len(names) == 2 * len(shapes) and all(name.endswith("down_proj") for name in shapes)
    begun = wire_basis.to_state(drawn(dict(sorted(shapes.items())), 3, seed=config.seed).sides)
    for name in names:
        torch.testing.assert_close(sent(grid, 0)[name], begun[name], rtol=0, atol=1e-6)

    m, v = ({name: torch.zeros_like(begun[name]).double() for name in names} for _ in range(2))
    now = {name: begun[name].double() for name in names}
    for number in range(3):
        replies, step = came(grid, number), number + 1
        total = sum(examples for _, examples in replies)
        for name in names:
            mean = torch.stack([state[name].double() * (n / total) for state, n in replies]).sum(0)
            m[name] = 0.9 * m[name] + 0.1 * mean
            v[name] = 0.99 * v[name] + 0.01 * mean.square()
            slope = m[name] / (1 - 0.9**step)
            now[name] -= 1e-2 * slope / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            if number < 2:
                torch.testing.assert_close(sent(grid, step)[name].double(), now[name], rtol=0, atol=1e-5)
    wanted = orthonormal(CoreBasis(wire_basis.from_state({n: t.float() for n, t in now.items()})))
    for name, tensor in wire_basis.to_state(wanted.sides).items():
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-4)


def test_what_went_down_and_up_is_told(given: Given, tmp_path: Path) -> None:
    grid = run(given(), tmp_path / "work")
    rounds = result(tmp_path / "work")["rounds"]
    told = [(one["mode"], one["round"]) for one in rounds]
    assert told == [("shared", 1), ("personal", 2), ("basis", 3), ("basis", 4)]
    down = sum(r.count_bytes() for m in grid.of_type("train.basis") for r in m.content.values())
    up = sum(r.count_bytes() for m in trained(grid) for r in m.content.values())
    assert sum(one["bytes_down"] for one in rounds[2:]) == down
    assert sum(one["bytes_up"] for one in rounds[2:]) == up
    for message in grid.of_type("train.basis"):  # beside what all share, as its rounds have left it
        shared = message.content.array_records["shared"].to_torch_state_dict()
        assert any(float(tensor.abs().max()) > 0 for name, tensor in shared.items() if "lora_B" in name)


def test_a_core_goes_on_in_the_next_round_where_it_was(given: Given, tmp_path: Path) -> None:
    whole = given(basis_learning_rate=1e-9, batch_size=6)  # every step sees all of a user's text
    grid = run(whole, tmp_path / "work")
    told = [m.content.metric_records["metrics"] for m in trained(grid)]
    for first, second in zip(told[: len(USERS)], told[len(USERS) :], strict=True):
        losses = [first["train-loss-first"], first["train-loss-last"], second["train-loss-first"]]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
    again = run(given(basis_learning_rate=1e-9, batch_size=6, basis_steps=2), tmp_path / "work")
    begun = [m.content.metric_records["metrics"]["train-loss-first"] for m in trained(again)]
    for one, loss in zip(told[: len(USERS)], begun[: len(USERS)], strict=True):  # at nothing, in another run
        assert loss == pytest.approx(one["train-loss-first"], abs=1e-5)


def test_cores_are_trained_beside_the_shared_adapter(given: Given, tmp_path: Path) -> None:
    """One that hardly moves leaves that adapter's loss, which is not the base model's."""
    still = given(basis_core_learning_rate=1e-9, local_steps=8, learning_rate=1e-2)
    grid = run(still, tmp_path / "work")
    metrics = [m.content.metric_records["metrics"] for m in trained(grid)]
    assert len(metrics) == 2 * len(USERS)
    for told in metrics:
        assert told["emulator-loss"] == pytest.approx(told["emulator-loss-shared"], abs=1e-5)
        assert told["emulator-loss"] != pytest.approx(told["emulator-loss-base"], abs=1e-3)


def test_what_a_user_trains_to_get_there_stays_where_it_is(given: Given, tmp_path: Path) -> None:
    grid = run(given(), tmp_path / "work")
    for state, _ in came(grid, 0):
        assert state.keys() == sent(grid, 0).keys()  # gradients of U and V of the projections named, no core
    kept = list((tmp_path / "clients").rglob("*.safetensors"))
    assert len(kept) == 2 * len(USERS) and all(path.stat().st_mode & 0o777 == 0o600 for path in kept)


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


@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.long), 4])
def test_a_killed_attempt_goes_on_to_the_same_directions(given: Given, tmp_path: Path, after: int) -> None:
    config = given()
    with pytest.raises(Killed):
        run(config, tmp_path / "work", tamper=Dies(after))
    again = run(config, tmp_path / "work")
    assert len(again.of_type("train.basis")) == len(USERS) * (2 - after // len(USERS))
    run(config, tmp_path / "whole")
    assert directions(tmp_path / "work").id == directions(tmp_path / "whole").id


@pytest.mark.long
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


@pytest.mark.long
def test_the_median_of_the_gradients_is_taken_where_means_are_robust(given: Given, tmp_path: Path) -> None:
    opposed = arrays(lambda s: {n: -1e3 * t for n, t in s.items()})
    once = {"basis_rounds": 1, "max_update": 1e9}
    found = {}
    for robust in ("mean", "median"):
        for tamper in (None, only_in_basis_rounds("bob", opposed)):
            workdir = tmp_path / f"{robust} {tamper is None}"
            run(given(robust=robust, **once), workdir, tamper=tamper)
            found[robust, tamper is None] = directions(workdir)
    for (name, alone), (_, other) in zip(
        *(found[r, True].tensors().items() for r in ("mean", "median")), strict=True
    ):
        assert not torch.equal(alone, other), name

    def agree(robust: str) -> float:
        """Share of numbers that moved the same way as without the one who sends the opposite."""
        held, plain = found[robust, False].tensors(), found[robust, True].tensors()
        first = begun(found[robust, True])
        same = [torch.sign(held[n] - first[n]) == torch.sign(plain[n] - first[n]) for n in held]
        return float(torch.cat([one.flatten() for one in same]).float().mean())

    assert agree("median") > agree("mean") + 0.1


def begun(found: CoreBasis) -> Mapping[str, Tensor]:
    return drawn(dict(sorted(found.module_shapes().items())), 3, seed=0).tensors()


def test_noise_comes_upon_gradients_before_they_leave_and_every_round_is_counted(
    given: Given, tmp_path: Path
) -> None:
    grid = run(given(dp_at="client", dp_clip=0.5, dp_noise=1.0), tmp_path / "work")
    numbers = sum(tensor.numel() for tensor in sent(grid, 0).values())
    for state, _ in came(grid, 0):  # clipped to 0.5, and 0.5 of noise a number
        size = float(sum(tensor.square().sum() for tensor in state.values())) ** 0.5
        assert 0.8 * 0.5 * numbers**0.5 < size < 1.2 * 0.5 * numbers**0.5 + 0.5
    told = result(tmp_path / "work")["privacy"]
    assert told["releases"] == 1 + 2 and told["at"] == "client"  # shared rounds and those of the basis


# ---- when it is over


def test_after_an_episode_cores_begin_at_nothing_in_directions_that_are_orthonormal(
    given: Given, tmp_path: Path
) -> None:
    told = {"basis_rounds": 5, "basis_episode": 2, "basis_learning_rate": 5e-2}
    with pytest.raises(Killed):
        run(given(**told), tmp_path / "work", tamper=Dies(2 * len(USERS)))  # as the second one begins
    grid = run(given(**told), tmp_path / "work")
    assert len(grid.of_type("train.basis")) == 3 * len(USERS)
    whole = run(given(**told), tmp_path / "whole")
    assert directions(tmp_path / "work").id == directions(tmp_path / "whole").id
    eye = torch.eye(3)
    for number in range(5):
        sides = wire_basis.from_state(sent(whole, number)).values()
        straight = [torch.allclose(side.mT @ side, eye, atol=1e-5) for both in sides for side in both]
        assert all(straight) if number in (0, 2, 4) else not any(straight)
    metrics = [m.content.metric_records["metrics"] for m in trained(whole)]
    for user in range(len(USERS)):
        own = [metrics[number * len(USERS) + user] for number in range(5)]
        # the first step of an episode is the shared adapter's, of whichever examples
        assert own[2]["train-loss-first"] > own[1]["train-loss-last"] - 0.5
    kept = sorted((tmp_path / "clients").rglob("round-*.safetensors"))
    assert {path.name for path in kept} >= {"round-0006.safetensors", "round-0007.safetensors"}


def test_a_task_that_there_is_none_of_is_an_error(given: Given, tmp_path: Path) -> None:
    here = context(1)
    (tmp_path / "run.toml").write_text("")
    here.run_config = {"config": str(tmp_path / "run.toml"), "workdir": str(tmp_path), "task": "learn"}
    allowed = ", ".join((simulation.FEDERATE, simulation.LEARN, simulation.EVALUATE))
    with pytest.raises(FederationError, match=f"task = 'learn', allowed: {allowed}"):
        main(InProcessGrid(NODES), here)
