"""Every mode end to end: what travels, what stays at home, what is handed in; killed, late, hostile."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from clients.workbench import workbench
from server.federation import Federation
from soppu import adapter as adapters
from soppu import config as configuration
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.federation import privacy, wire
from soppu.federation.attach import attached, initial_pairs
from soppu.federation.modes import Sharing
from soppu.registry import Registry
from soppu.sharing import SharingSettings
from tests.server import test_federation as whole
from tests.server import test_strategy as unit
from tests.server.grid import InProcessGrid
from tests.server.test_federation import Killed, WriteUsers, result, round_of, shared_state, stored
from tests.thorough import thorough

# other tests cover the same lines; tracing takes a third of the time
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]

NODES = [{"partition-id": n} for n in range(2)]
ROUNDS = 2
SERVED = ("base", "shared", "personal")
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Run:
    """One that has ended."""

    config: Config
    workdir: Path
    grid: InProcessGrid
    federation: Federation

    def asked(self, number: int) -> list[State]:
        """What of an adapter was sent to the two users in a round."""
        return [shared_state(m) for m in self.grid.of_type("train") if round_of(m) == number]

    def replies(self, number: int) -> list[Message]:
        """To training: the n-th pair of this attempt."""
        replies = [m for m in self.grid.replies if "who" in m.content]
        return replies[2 * (number - 1) : 2 * number]

    def answered(self, number: int) -> list[State]:
        """What they sent back."""
        return [m.content["arrays"].to_torch_state_dict() for m in self.replies(number)]

    def adapters(self) -> dict[str, LoraAdapter]:
        return stored(self.config, self.workdir)


Start = Callable[..., Run]


def starter(root: Path, base: Path, write_users: WriteUsers) -> Start:
    """`start(mode="fedsa", grid=…)`: two users, two shared rounds, no alignment between them."""

    def start(*, name: str = "work", grid: InProcessGrid | None = None, **settings: Any) -> Run:
        made = {"client_state": str(root / name / "clients"), **settings}
        config = whole.builder(root, base, write_users)(
            data={"users": ["alice", "bob"]},
            align={"warmup_steps": 2, "round_steps": 0},
            federation={"rounds": ROUNDS, **made},
            registry={"root": str(root / name / "registry")},
        )
        workbench.cache_clear()
        return Run(config, root / name, *whole.federate(config, root / name, grid or InProcessGrid(NODES)))

    return start


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path, write_users: WriteUsers) -> Start:
    return starter(tmp_path, tiny_base, write_users)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, write_users: WriteUsers, flower_identity: None
) -> Callable[[str], Run]:
    """A run of each mode that a test asks for, once."""
    done: dict[str, Run] = {}

    def run(mode: str) -> Run:
        if mode not in done:
            done[mode] = starter(tmp_path_factory.mktemp(mode), tiny_base, write_users)(mode=mode)
        return done[mode]

    return run


def names(states: list[State]) -> set[str]:
    """The factors in there: {"A", "B"}."""
    return {name.rsplit(".", 2)[-2][-1] for state in states for name in state}


@pytest.mark.parametrize(
    ("mode", "sides"), [("shared", "AB"), ("fedsa", "A"), ("dual", "AB"), ("ffa", "B"), ("local", "")]
)
def test_only_what_is_shared_travels_in_a_shared_round(
    runs: Callable[[str], Run], mode: str, sides: str
) -> None:
    run = runs(mode)
    last = 1 if mode == "local" else ROUNDS + 1
    assert len(result(run.workdir)["rounds"]) == last
    for number in range(1, last):
        assert names(run.asked(number)) == names(run.answered(number)) == set(sides)
        ranks = {min(t.shape) for state in run.answered(number) for t in state.values()}
        assert ranks == ({1} if mode == "dual" else {2})
        # the next round begins with the mean of this one, by examples
        one, other = run.answered(number)
        first, second = (float(m.content["metrics"]["num-examples"]) for m in run.replies(number))
        for name, tensor in run.asked(number + 1)[0].items():
            mean = (first * one[name] + second * other[name]) / (first + second)
            torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-7)
    assert names(run.asked(last)) == set(sides)
    assert names(run.answered(last)) == (set() if mode == "shared" else {"A", "B"})  # it is handed in whole
    found = result(run.workdir)
    assert (found["mode"], found["privacy"], found["refused"]) == (mode, None, {})


def test_bytes_on_the_wire_are_those_of_the_mode(runs: Callable[[str], Run]) -> None:
    up = {mode: result(runs(mode).workdir)["rounds"][0]["bytes_up"] for mode in ("shared", "fedsa", "dual")}
    assert up["fedsa"] < 0.7 * up["shared"] and up["dual"] < 0.8 * up["shared"]
    last = result(runs("shared").workdir)["rounds"][-1]
    assert last["bytes_up"] < 0.1 * up["shared"]  # numbers alone


@pytest.mark.parametrize("mode", ["shared", "fedsa", "dual", "ffa", "local"])
def test_every_mode_exports_folders_that_peft_loads_on_the_full_model(
    runs: Callable[[str], Run], mode: str, tiny_llama: PreTrainedModel
) -> None:
    run, ids = runs(mode), torch.tensor([[5, 17, 200, 9]])
    one, other = run.adapters().values()
    assert {pair.rank for pair in one.pairs.values()} == {2}
    for user, adapter in run.adapters().items():
        folder = Path(run.config.registry.root, "adapters", result(run.workdir)["adapters"][user])
        with attached(tiny_llama, adapter):
            expected = tiny_llama(ids).logits
        peft = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder).eval()
        torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(expected, tiny_llama(ids).logits)
    assert (one.content_hash() == other.content_hash()) == (mode == "shared")


def test_what_is_served_holds_what_is_shared_as_it_was_averaged(runs: Callable[[str], Run]) -> None:
    """And a part that no other user has."""
    seeds = initial_pairs(runs("ffa").federation.agreement.shapes, rank=2, seed=0)
    for mode in ("fedsa", "dual", "ffa", "shared"):
        run = runs(mode)
        sent = run.asked(ROUNDS + 1)[0]
        one, other = run.adapters().values()
        for name in one.pairs:
            A, B = one.pairs[name].A, one.pairs[name].B
            if mode == "fedsa":
                assert torch.equal(A, sent[f"{name}.lora_A.weight"])
                assert not torch.equal(B, other.pairs[name].B)
            elif mode == "ffa":
                assert torch.equal(A, seeds[name].A) and torch.equal(A, other.pairs[name].A)
                assert not torch.equal(B, sent[f"{name}.lora_B.weight"])  # personal steps
            else:
                shared = A.shape[0] if mode == "shared" else 1
                assert torch.equal(A[:shared], sent[f"{name}.lora_A.weight"])
                assert torch.equal(B[:, :shared], sent[f"{name}.lora_B.weight"])
                if mode == "dual":
                    assert not torch.equal(A[1:], other.pairs[name].A[1:])
                    assert not torch.equal(B[:, 1:], other.pairs[name].B[:, 1:])


def test_shared_is_what_anybody_could_be_served_and_is_measured_as_that(runs: Callable[[str], Run]) -> None:
    """Not with a user's own part of it: where no product is shared, that is the base model."""
    for mode in ("shared", "fedsa", "dual", "ffa", "local"):
        run = runs(mode)
        last = 1 if mode == "local" else ROUNDS + 1
        common = adapters.read(run.workdir / "shared")
        alike = all(not pair.B.any() for pair in common.pairs.values())
        assert alike == (mode in ("fedsa", "local")) == (not run.federation.sharing.in_common)
        for message in run.replies(last):
            told = message.content["metrics"]
            assert (told["emulator-loss-shared"] == told["emulator-loss-base"]) == alike
        served = set(result(run.workdir)["served"].values())
        assert served <= (
            {"base", "shared"} if mode == "shared" else {"base", "personal"} if alike else {*SERVED}
        )


def test_a_user_s_own_part_goes_on_from_the_round_before(runs: Callable[[str], Run]) -> None:
    for mode in ("fedsa", "dual"):
        run = runs(mode)
        logs = result(run.workdir)["rounds"]
        assert [{one["own_since"] for one in log["received"].values()} for log in logs] == [{0}, {1}, {2}]
        kept = sorted((run.workdir / "clients").rglob("round-*.safetensors"))
        assert [path.name for path in kept] == ["round-0001.safetensors", "round-0002.safetensors"] * 2
        assert {path.parent.name for path in kept} == {"user-alice", "user-bob"}
    ffa = runs("ffa")
    assert not (ffa.workdir / "clients").exists()  # nothing of the user's is trained between the rounds
    logs = result(ffa.workdir)["rounds"]
    assert {one["own_since"] for log in logs for one in log["received"].values()} == {None}


@pytest.mark.parametrize(
    ("mode", "number", "after"),
    [("dual", 3, 1), *thorough(("fedsa", 2, 1), ("fedsa", 2, 2), ("dual", 2, 2))],
)
def test_a_killed_run_ends_with_the_same_own_parts(
    runs: Callable[[str], Run], start: Start, mode: str, number: int, after: int
) -> None:
    """Killed when one user, or all, had trained and written the round down that is asked for again."""
    seen: list[Message] = []

    def tamper(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and round_of(asked) == number:
            seen.append(asked)
            if len(seen) >= after:
                raise Killed
        return reply

    with pytest.raises(Killed):
        start(mode=mode, grid=InProcessGrid(NODES, tamper=tamper))
    again = start(mode=mode)
    assert [round_of(m) for m in again.grid.of_type("train")] == [
        n for n in range(number, ROUNDS + 2) for _ in NODES
    ]
    assert result(again.workdir)["adapters"] == result(runs(mode).workdir)["adapters"]


def test_a_user_who_missed_a_round_goes_on_from_their_own_last_and_one_who_lost_all_anew(
    start: Start, tmp_path: Path
) -> None:
    def tamper(asked: Message, reply: Message) -> Message | None:
        if asked.metadata.message_type != "train":
            return reply
        user = ["alice", "bob"][asked.metadata.dst_node_id - 100]
        if (user, round_of(asked)) == ("alice", 3):  # alice's disk is lost after this round
            for path in (tmp_path / "work" / "clients").rglob("user-alice/*"):
                path.unlink()
        return None if (user, round_of(asked)) == ("bob", 2) else reply

    class Asleep(InProcessGrid):
        """Bob is not there in round 2."""

        def _answer(self, message: Message) -> Message | None:
            away = message.metadata.message_type == "train" and round_of(message) == 2
            return None if away and message.metadata.dst_node_id == 101 else super()._answer(message)

    run = start(mode="fedsa", rounds=3, min_users=1, grid=Asleep(NODES, tamper=tamper))
    since = [
        {user: one["own_since"] for user, one in log["received"].items()}
        for log in result(run.workdir)["rounds"]
    ]
    assert since == [{"alice": 0, "bob": 0}, {"alice": 1}, {"alice": 2, "bob": 1}, {"alice": 0, "bob": 3}]


def test_a_real_node_keeps_its_part_where_it_wants_to_and_not_where_the_server_says(
    start: Start, tmp_path: Path, write_users: WriteUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_users(tmp_path / "home", {"alice": 12, "bob": 9})
    monkeypatch.chdir(tmp_path)
    nodes = [
        {"user-id": "alice", "data-source": str(folder / "alice.jsonl"), "state-dir": str(tmp_path / "hers")},
        {"user-id": "bob", "data-source": str(folder / "bob.jsonl")},
    ]
    start(mode="dual", rounds=1, grid=InProcessGrid(nodes))
    assert not (tmp_path / "work" / "clients").exists()
    assert len(list((tmp_path / "hers").rglob("user-alice/round-0001.safetensors"))) == 1
    assert len(list((tmp_path / ".soppu" / "clients").rglob("user-bob/round-0001.safetensors"))) == 1


# ---- averages, in the strategy


def strategy(last_round: int = 2, *, mode: str = "finetune", **settings: Any) -> unit.Server:
    server = unit.Server(last_round=last_round)
    server.strategy._sharing = SharingSettings(mode=mode, **settings)  # type: ignore[arg-type]
    return server


def test_the_strategy_averages_by_the_rule_of_the_configuration() -> None:
    states = [wire.to_state(unit.make_adapter(seed)) for seed in unit.SEEDS.values()]
    server = strategy(robust="median")
    arrays, metrics = server.strategy.aggregate_train(1, unit.answer(server.ask()))
    assert arrays is not None and metrics is not None
    for name, tensor in arrays.to_torch_state_dict().items():
        middle = torch.stack([state[name] for state in states]).median(0).values
        torch.testing.assert_close(tensor, middle, rtol=1e-5, atol=1e-6)
    server = strategy(average="products")
    arrays, _ = server.strategy.aggregate_train(1, unit.answer(server.ask()))
    assert arrays is not None
    found = wire.loose_from_state(arrays.to_torch_state_dict())
    for name, pair in found.pairs.items():
        products = [unit.make_adapter(seed).pairs[name].delta() for seed in unit.SEEDS.values()]
        dense = sum(w / 100 * p for w, p in zip((30, 10, 60), products, strict=True))
        U, sizes, V = torch.linalg.svd(dense)
        torch.testing.assert_close(pair.delta(), U[:, :2] * sizes[:2] @ V[:2], rtol=1e-4, atol=1e-4)


def test_where_changes_are_clipped_a_large_one_is_not_refused_but_told() -> None:
    server = strategy(clip="median")
    replies = unit.answer(server.ask())
    unit.scaled(replies[1].content, 1e3)
    arrays, _ = server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert arrays is not None and not log.refused and sorted(log.accepted) == ["alice", "bob", "carol"]
    assert "bob" in log.clipped and log.clipped["bob"] < 0.01
    own = strategy(1, clip="median")  # of their own adapters no mean is made: there it is as ever
    replies = unit.answer(own.ask())
    unit.scaled(replies[1].content, 1e3)
    own.strategy.aggregate_train(1, replies)
    assert (
        own.kept.keys() == {"alice", "carol"} and "median of the round" in own.strategy.logs[0].refused["bob"]
    )


@pytest.mark.parametrize(
    ("mode", "personal", "sent", "fault"),
    [
        ("fedsa", False, "whole", r"tensor .*lora_B.weight is not part of the plan \(2 in all\)"),
        ("ffa", False, "whole", r"tensor .*lora_A.weight is not part of the plan \(2 in all\)"),
        ("dual", False, "whole", r"shape \(2, \d\), the plan says \(1, \d\)"),
        ("fedsa", True, "shared", r"tensor .*lora_B.weight is missing \(2 in all\)"),
        ("dual", True, "shared", r"shape \(1, \d\), the plan says \(2, \d\)"),
        ("shared", True, "whole", r"is not part of the plan \(4 in all\)"),
        ("fedsa", False, "nan", "holds NaN or Inf"),
        ("dual", True, "nan", "holds NaN or Inf"),
    ],
)
def test_a_reply_of_another_mode_is_refused_by_name(mode: str, personal: bool, sent: str, fault: str) -> None:
    """More than was agreed, or less: the round goes on with the others."""
    cut = Sharing.of(configuration.from_dict({"lora": {"rank": 2}, "federation": {"mode": mode}}))
    agreement = dataclasses.replace(unit.AGREEMENT, sharing=cut)
    server = unit.Server(last_round=1 if personal else 2, agreement=agreement)
    begun = ArrayRecord(cut.start(unit.SHAPES)[0])
    order = ConfigRecord({"settings": "{}", "plan": "{}"})
    asked = list(server.strategy.configure_train(1, begun, order, None))  # type: ignore[arg-type]
    replies = unit.answer(asked)
    for reply in replies:
        state = reply.content["arrays"].to_torch_state_dict()
        parts = {"whole": state, "shared": cut.split(state)[0]}
        right = (state if cut.trains_alone else {}) if personal else parts["shared"]
        parts["nan"] = {name: tensor * math.nan for name, tensor in right.items()}
        is_bob = reply.content["who"]["user"] == "bob"
        reply.content["arrays"] = ArrayRecord(parts[sent] if is_bob else right)
    server.strategy.aggregate_train(1, replies)
    log = server.strategy.logs[0]
    assert log.accepted == ["alice", "carol"] and list(log.refused) == ["bob"]
    assert re.search(f"^bob: .*{fault}", log.refused["bob"]), log.refused["bob"]
    assert server.kept.keys() == ({"alice", "carol"} if personal else set())
    if mode == "shared":  # whatever anybody says, what is stored is the average that the server sent
        kept = {name: wire.to_state(adapter) for name, adapter in server.kept.items()}
        assert all(
            torch.equal(tensor, kept["alice"][name]) for name, tensor in begun.to_torch_state_dict().items()
        )


# ---- privacy, end to end


def test_noise_at_the_client_hides_all_that_leaves_and_every_release_is_counted(start: Start) -> None:
    seen: list[Message] = []

    def tamper(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and round_of(asked) == 2:
            seen.append(asked)
            if len(seen) == 2:
                raise Killed
        return reply

    options = {"mode": "fedsa", "dp_at": "client", "dp_clip": 0.1, "dp_noise": 0.5}
    with pytest.raises(Killed):
        start(grid=InProcessGrid(NODES, tamper=tamper), **options)
    run = start(**options)
    told = result(run.workdir)["privacy"]
    assert (told["at"], told["clip"], told["noise"], told["releases"]) == ("client", 0.1, 0.5, 4)
    assert told["epsilon"] == privacy.epsilon_of(0.25, 4, 1e-5)
    begun = run.asked(2)[0]
    for state in run.answered(1):  # the first of this attempt: round 2
        change = torch.cat([(state[name] - begun[name]).flatten() for name in begun])
        # the step is at most 0.1, beside noise of 0.05 a number
        assert float(change.norm()) == pytest.approx(0.05 * math.sqrt(len(change)), rel=0.2)
    for adapter in run.adapters().values():  # A is held in the last round, and what is held is no secret
        for name, pair in adapter.pairs.items():
            assert torch.equal(pair.A, run.asked(3)[0][f"{name}.lora_A.weight"])


def test_noise_at_the_server_is_in_the_average_and_its_epsilon_in_the_result(start: Start) -> None:
    run = start(mode="finetune", dp_clip=0.05, dp_noise=1.0)
    told = result(run.workdir)["privacy"]
    assert (told["at"], told["releases"]) == ("server", ROUNDS)
    assert told["epsilon"] == privacy.epsilon_of(1.0, ROUNDS, 1e-5)
    assert "reaches as it is" in told["not_covered"]
    begun, then = run.asked(1)[0], run.asked(2)[0]
    moved = torch.cat([(then[name] - begun[name]).flatten() for name in begun])
    assert float(moved.norm()) == pytest.approx(0.025 * math.sqrt(len(moved)), rel=0.2)
    assert all(len(log["clipped"]) == 2 for log in result(run.workdir)["rounds"][:ROUNDS])
    assert Registry.open(run.config.registry.root).current_set().keys() == {"alice", "bob"}
    assert configuration.from_dict(configuration.to_dict(run.config)) == run.config
