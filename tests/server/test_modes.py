"""Every mode end to end: what travels, what stays at home, what is handed in; killed, late, lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from transformers import PreTrainedModel

from soppu import adapter as adapters
from soppu.federation.attach import attached, initial_pairs
from tests.server.grid import InProcessGrid
from tests.server.mode_runs import NODES, ROUNDS, Run, Start, State, start, starter
from tests.server.small_run import Killed, WriteUsers, result, round_of
from tests.thorough import thorough

__all__ = ["start"]
# other tests cover the same lines; tracing takes a third of the time
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]

SERVED = ("base", "shared", "personal")


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
