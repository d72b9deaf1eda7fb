"""The cut: what is shared and what is a user's own go apart and come together again, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from soppu import config as configuration
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError, ConfigError, FederationError
from soppu.federation import modes, wire
from soppu.federation.modes import Sharing
from soppu.federation.own_part import OwnPart
from soppu.sharing import Mode
from tests.soppu.test_wire import SHAPES, make

MODES = get_args(Mode)
RANK = 3
# mode -> rows of A and columns of B that travel in a shared round
SHARED = {
    "shared": (3, 3),
    "finetune": (3, 3),
    "fedsa": (3, 0),
    "dual": (2, 2),
    "ffa": (0, 3),
    "local": (0, 0),
}


def sharing(mode: str) -> Sharing:
    return Sharing.of(configuration.from_dict({"lora": {"rank": RANK}, "federation": {"mode": mode}}))


def whole(seed: int) -> dict[str, Tensor]:
    return wire.to_state(make(rank=RANK, seed=seed))


@pytest.mark.parametrize("mode", MODES)
def test_parts_are_disjoint_whole_together_and_of_full_model_names(mode: str) -> None:
    state, (a, b) = whole(1), SHARED[mode]
    shared, own = sharing(mode).split(state)
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == wire.tensors(SHAPES, a, b)
    assert {name: tuple(t.shape) for name, t in own.items()} == wire.tensors(SHAPES, RANK - a, RANK - b)
    joined = sharing(mode).join(shared, own)
    assert joined.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in joined.items())
    assert sharing(mode).sent(SHAPES, personal=False) == wire.tensors(SHAPES, a, b)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_a_shared_and_an_own_part_is_one_plain_lora(mode: str) -> None:
    """Whoever's own part it is: the change of a module is that of both parts together, at rank r."""
    cut = sharing(mode)
    shared, own = cut.split(whole(1))[0], cut.split(whole(2))[1]
    like = LoraAdapter({}, "tiny", "b" * 64, fan_in_fan_out=True)
    exported = modes.export(cut.join(shared, own), like)
    assert (exported.base_model, exported.base_hash, exported.fan_in_fan_out) == ("tiny", "b" * 64, True)
    a, b = SHARED[mode]
    common, mine = make(rank=RANK, seed=1), make(rank=RANK, seed=2)
    for name, pair in exported.pairs.items():
        assert pair.rank == RANK
        rows = torch.cat([common.pairs[name].A[:a], mine.pairs[name].A[a:]])
        columns = torch.cat([common.pairs[name].B[:, :b], mine.pairs[name].B[:, b:]], 1)
        torch.testing.assert_close(pair.delta(), columns @ rows)
        if mode == "dual":  # as a sum of two adapters
            both = (
                common.pairs[name].B[:, :a] @ common.pairs[name].A[:a]
                + mine.pairs[name].B[:, a:] @ mine.pairs[name].A[a:]
            )
            torch.testing.assert_close(pair.delta(), both)


@pytest.mark.parametrize("mode", MODES)
def test_all_begin_alike_and_with_no_change(mode: str) -> None:
    cut = sharing(mode)
    shared, own = cut.start(SHAPES)
    begun = cut.join(shared, own)
    finetune = sharing("finetune").start(SHAPES)[0]
    for name, tensor in begun.items():
        assert torch.equal(tensor, finetune[name])
        assert bool(tensor.any()) == name.endswith("lora_A.weight")


@pytest.mark.parametrize("mode", MODES)
def test_the_wire_takes_exactly_what_the_mode_sends(mode: str) -> None:
    cut = sharing(mode)
    for personal in (False, True):
        wanted = cut.sent(SHAPES, personal=personal)
        state = {name: torch.ones(shape) for name, shape in wanted.items()}
        wire.check(state, wanted, who="ann")
        with pytest.raises(AdapterError, match=r"^ann: tensor extra is not part of the plan \(1 in all\)"):
            wire.check({**state, "extra": torch.ones(1)}, wanted, who="ann")
        if not state:
            continue
        name = sorted(state)[-1]
        faults: dict[str, dict[str, Tensor]] = {
            "is missing": {key: value for key, value in state.items() if key != name},
            "the plan says": {**state, name: torch.ones(7, 7)},
            "floating-point": {**state, name: state[name].int()},
            "NaN": {**state, name: state[name] * float("nan")},
        }
        for reason, bad in faults.items():
            with pytest.raises(AdapterError, match=f"^ann: .*{reason}"):
                wire.check(bad, wanted, who="ann")


def test_a_whole_adapter_is_refused_where_a_part_was_agreed() -> None:
    """The part that is a user's own does not slip in: not as a tensor more, not as rows more."""
    with pytest.raises(AdapterError, match=r"lora_B.weight is not part of the plan \(2 in all\)"):
        wire.check(whole(1), sharing("fedsa").sent(SHAPES, personal=False), who="ann")
    with pytest.raises(AdapterError, match=r"shape \(3, 5\), the plan says \(2, 5\)"):
        wire.check(whole(1), sharing("dual").sent(SHAPES, personal=False), who="ann")


def test_what_is_held_while_a_mode_trains() -> None:
    found = {mode: tuple(sharing(mode).held(personal=last) for last in (False, True)) for mode in MODES}
    free = (0, 0)
    assert found == {
        "shared": (free, free),
        "finetune": (free, free),
        "local": (free, free),
        "fedsa": (free, (3, 0)),
        "dual": (free, (2, 2)),
        "ffa": ((3, 0), (3, 0)),
    }
    assert {mode for mode in MODES if sharing(mode).shared_rounds(4) == 0} == {"local"}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"mode": "solo"}, "federation.mode = 'solo', allowed: shared, finetune, fedsa, dual, local, ffa"),
        ({"private_rank": 2}, "federation.private_rank = 2: only the mode dual .*; allowed here: 0"),
        ({"mode": "dual", "private_rank": 8}, "lora.rank = 8 .* allowed: 0 .half. or 1 to 7"),
        ({"mode": "fedsa", "average": "products"}, "allowed modes: shared, finetune, dual"),
        ({"mode": "ffa", "average": "products"}, "the mode ffa averages no products"),
        ({"average": "products", "robust": "krum"}, "federation.robust = 'krum': .*allowed here: mean"),
        ({"robust_share": 0.5}, "federation.robust_share = 0.5, allowed: below 0.5"),
        ({"clip": -1.0}, "federation.clip = -1.0, allowed: 0, a number above 0, or median"),
        ({"clip": "mean"}, "federation.clip = 'mean', allowed: 0, a number above 0, or median"),
        ({"mode": "local", "clip": "median"}, "the mode local averages nothing; allowed here: 0.0"),
        ({"mode": "local", "robust": "median"}, "federation.robust = 'median': the mode local"),
        ({"dp_noise": 1.0}, "federation.dp_clip is 0; allowed here: 0, or dp_clip above 0"),
        ({"dp_clip": 1.0, "robust": "median"}, "federation.robust = 'median': noise at the server"),
        ({"dp_clip": 1.0, "average": "products"}, "federation.average = 'products': noise at the server"),
        ({"dp_clip": 1.0, "clip": 2.0}, "federation.clip = 2.0: noise at the server"),
        ({"dp_clip": 1.0, "mode": "local"}, "federation.dp_at = 'server': .*; allowed here: 'client'"),
        ({"form": "cores"}, "federation.form = 'cores', allowed: lora, core, auto"),
        ({"form": "core", "core_own_rank": 5}, "federation.core_own_rank = 5, allowed: at most 4"),
        ({"form": "auto", "cohort": 1}, "federation.cohort = 1, allowed: at least 2"),
        ({"form": "auto", "basis_rank": 0}, "federation.basis_rank = 0, allowed: at least 1"),
        (
            {"form": "auto", "basis_of": "users"},
            "federation.basis_of = 'users', allowed: adapters, shared, learnt",
        ),
        (
            {"form": "auto", "basis_of": "shared", "mode": "fedsa"},
            "federation.mode = 'fedsa': a basis around the shared .*: 'finetune'",
        ),
        (
            {"form": "auto", "basis_of": "learnt", "mode": "dual"},
            "federation.mode = 'dual': a basis around the shared .*: 'finetune'",
        ),
        ({"form": "auto", "basis_of": "learnt", "basis_learning_rate": 0.0}, "= 0.0, allowed: above 0"),
        (
            {"form": "auto", "basis_modules": ["down_proj"]},
            r"federation.basis_modules = .*basis_of is 'adapters'; allowed here: \[\], or basis_of =",
        ),
        ({"form": "core", "mode": "shared"}, "'shared': in the form core every user .*: any but shared"),
        ({"form": "auto", "dp_clip": 1.0}, "federation.dp_at = 'server': in the form auto .*: 'client'"),
        ({"form": "core", "wire": "ternary"}, "'ternary': in the form core cores are .*here: 'float32'"),
        ({"dp_delta": 0.0}, "federation.dp_delta = 0.0, allowed: above 0"),
    ],
)
def test_settings_that_make_no_sense_together_name_those_that_do(
    given: dict[str, object], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        configuration.from_dict({"federation": given})


def test_a_dual_adapter_has_rank_for_both() -> None:
    with pytest.raises(ConfigError, match="lora.rank = 1"):
        configuration.from_dict({"lora": {"rank": 1}, "federation": {"mode": "dual"}})
    halves = configuration.from_dict({"lora": {"rank": 5}, "federation": {"mode": "dual"}})
    assert (Sharing.of(halves).own_rank, Sharing.of(halves).shared_a) == (2, 3)


# ---- what a client remembers


def test_a_round_that_is_asked_for_again_begins_where_it_began(tmp_path: Path) -> None:
    memory = OwnPart.of(str(tmp_path), run="0" * 16, user="ann")
    assert memory.recall(before=1) == (0, {})
    for number in (1, 2, 3):
        since, _ = memory.recall(before=number)
        assert since == number - 1
        memory.keep(number, {"x": torch.full((2,), float(number))})
    for _ in range(2):  # the server was killed in round 3, and asks again
        since, state = memory.recall(before=3)
        assert (since, state["x"].tolist()) == (2, [2.0, 2.0])
        memory.keep(3, {"x": torch.full((2,), 30.0)})
    assert memory.recall(before=4)[1]["x"].tolist() == [30.0, 30.0]
    assert memory.recall(before=9)[0] == 3  # four rounds missed: from one's own last
    assert sorted(path.name for path in memory.folder.iterdir()) == [
        "round-0002.safetensors",
        "round-0003.safetensors",
    ]
    assert {path.stat().st_mode & 0o777 for path in memory.folder.iterdir()} == {0o600}


def test_a_run_that_begins_again_forgets_what_came_later(tmp_path: Path) -> None:
    memory = OwnPart.of(str(tmp_path), run="0" * 16, user="ann")
    for number in (1, 2, 3, 1):
        memory.keep(number, {"x": torch.full((1,), float(number))})
    assert memory.recall(before=4)[0] == 1


def test_users_and_runs_are_apart_and_names_are_no_paths(tmp_path: Path) -> None:
    folders = {
        OwnPart.of(str(tmp_path), run=run, user=user).folder
        for run in ("a" * 16, "b" * 16)
        for user in ("ann", "..", "a/b", "a%2Fb", "ann@example.org")
    }
    assert len(folders) == 10 and {folder.parents[1] for folder in folders} == {tmp_path}
    with pytest.raises(FederationError, match="the server says this is run '../../etc'"):
        OwnPart.of(str(tmp_path), run="../../etc", user="ann")


@pytest.mark.parametrize("damage", [b"", b"garbage" * 9])
def test_a_damaged_memory_is_an_error_that_names_the_file(tmp_path: Path, damage: bytes) -> None:
    memory = OwnPart.of(str(tmp_path), run="0" * 16, user="ann")
    memory.keep(1, {"x": torch.ones(1)})
    path = memory.folder / "round-0001.safetensors"
    path.write_bytes(damage)
    with pytest.raises(FederationError, match=f"{path}: cannot be read: .*delete it"):
        memory.recall(before=2)
