"""The study of personal forms: who takes part, what is made of rows, and a whole one of a tiny model."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from benchmarks import (
    changelogs,
    personal,
    personal_arms,
    personal_learnt,
    personal_page,
    personal_privacy,
    served_study,
)
from benchmarks.personal_arms import (
    BASE,
    BESIDE,
    BLOCKS,
    CORE,
    DOWN,
    FEDERATED,
    FULL,
    LEARNT,
    LORA,
    MORE,
    PROJECTED,
    RANDOM,
    SHARED,
    Arm,
    ours,
)
from benchmarks.personal_front import beside_controls, compared, front, smallest
from benchmarks.personal_ground import Ground, difference
from benchmarks.personal_users import Sizes, Words, roles
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.federation import emulator
from soppu.federation.train import mean_loss
from tests.benchmarks.tiny_study import people


def row(arm: str, numbers: int, *losses: float, corpus: str = "stdlib") -> dict[str, Any]:
    told = dict(zip("abc", losses, strict=True))
    mean = sum(losses) / 3
    return {"corpus": corpus, "arm": arm, "numbers": numbers, "losses": told, "mean": mean}


ROWS = [
    row(SHARED, 0, 2.5, 2.5, 2.5),
    row(MORE, 0, 2.0, 2.0, 2.0),
    row(FULL, 1000, 1.0, 1.5, 2.0),
    row(CORE, 10, 1.5, 1.9, 2.1),
    row(CORE, 100, 1.1, 1.4, 2.0),
    row(LORA, 50, 1.6, 1.6, 2.2),
]


def test_arms_are_held_against_shared_of_as_many_steps_and_the_full_lora() -> None:
    for order in (ROWS, ROWS[::-1]):
        told = {(one["arm"], one["numbers"]): one for one in compared(order)}
        small = told[CORE, 10]
        assert small["gain"] == pytest.approx(0.5 / 3)
        assert small["worst"] == pytest.approx(0.1)  # who loses most
        assert small["kept"] == pytest.approx(1 / 3) and small["better_than_shared"] == 2
        assert small["over_full"] == pytest.approx(-1 / 3)
        assert small["interval"][0] < small["gain"] < small["interval"][1]
        assert told[FULL, 1000]["kept"] == 1 and told[FULL, 1000]["over_full"] == 0


def test_without_a_longer_shared_one_the_shared_one_is_what_counts_and_without_any_nothing() -> None:
    without = [one for one in ROWS if one["arm"] != MORE]
    assert {one["arm"]: one for one in compared(without)}[FULL]["gain"] == pytest.approx(1.0)
    other = row(CORE, 10, 1.0, 1.0, 1.0, corpus="changelogs")
    assert "gain" not in compared([*ROWS, other])[-1]


def test_the_smallest_form_that_keeps_enough_is_ours_and_none_where_none_does() -> None:
    rows = compared(ROWS)
    found = smallest(rows)
    assert found is not None and (found["arm"], found["numbers"]) == (CORE, 100)
    less = smallest(rows, share=0.3)
    assert less is not None and less["numbers"] == 10
    assert smallest(rows, share=1.5) is None
    assert smallest(compared([*ROWS[:2], row(FULL, 9, 2.1, 2.1, 2.1), ROWS[3]])) is None  # no gain to keep


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([], []),
        ([(5, 1.0)], [0]),
        ([(1, 0.5), (2, 0.5), (3, 0.7)], [0, 2]),  # as much of more numbers is beaten
        ([(2, 0.1), (1, 0.3), (1, 0.2)], [1]),
        ([(1, 0.5), (1, 0.5)], [0]),
        ([(3, -0.5), (1, -1.0)], [1, 0]),
    ],
)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]], wanted: list[int]) -> None:
    assert front(points) == wanted


def test_a_control_stands_beside_the_best_of_ours_with_no_more_numbers() -> None:
    found = {one[0]["arm"]: one[1:] for one in beside_controls(compared([*ROWS, row("x", 5, 1.0, 1.0, 1.0)]))}
    assert found.keys() == {FULL, LORA, "x"}  # those with no numbers of a user's own are no controls
    best, apart = found[LORA]
    assert best is not None and best["numbers"] == 10
    assert apart is not None and apart[0] == pytest.approx(-0.1 / 3) and apart[1] <= apart[0] <= apart[2]
    assert found[FULL][0]["numbers"] == 100 and found["x"] == (None, None)


def test_nobody_is_in_two_parts_and_no_group_of_who_is_reported_is_elsewhere() -> None:
    found = roles(people(40, group=4), Sizes(basis=12, tuned=4, reported=6), seed=0)
    parts = found.basis, found.tuned, found.reported
    assert [len(part) for part in parts] == [12, 4, 6]
    groups = [{person.group for person in part} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    with pytest.raises(click.ClickException, match="basis: 39 users are needed"):
        roles(people(40), Sizes(basis=39, tuned=1, reported=1), seed=0)


def test_changelogs_give_entries_by_signature_dated_and_without_a_name(tmp_path: Path) -> None:
    entry = "pkg (1.{n}) unstable; urgency=low\n\n  * A change long enough to be learnt, number {n}.\n\n"
    sign = " -- Ann Author <Ann@example.org>  Mon, 0{n} Jan 2024 10:00:00 +0000\n\n"
    text = "".join((entry + sign).format(n=n) for n in range(1, 5))
    later = changelogs.UNTIL.strftime("%a, %d %b %Y %H:%M:%S %z")  # as an upgraded package has them
    text += entry.format(n=8) + f" -- Ann Author <ann@example.org>  {later}\n\n"
    text += entry.format(n=9) + " -- Bob <bob@example.org>  no date at all\n"
    for folder in ("a", "b"):  # two packages of one source have the same changelog
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a" / "changelog.gz").write_bytes(b"no gzip")
    found = changelogs.authors(tmp_path)
    assert list(found) == [changelogs.name_of("ann@EXAMPLE.org")]
    (records,) = found.values()
    assert [record.example.prompt for record in records] == [
        f"pkg (1.{n}) unstable; urgency=low\n\n" for n in range(1, 5)
    ]
    assert "example.org" not in json.dumps([record.example.completion for record in records])
    assert [record.date for record in records] == sorted(record.date or 0 for record in records)
    assert changelogs.packages(found, tmp_path) == ["a"] and changelogs.packages(["0"], tmp_path) == []
    assert changelogs.authors(tmp_path, least=5) == {} == changelogs.authors(tmp_path / "nothing")


def test_an_attack_is_as_good_as_the_order_of_losses() -> None:
    assert personal_privacy.auc([1, 2], [3, 4]) == 1
    assert personal_privacy.auc([3, 4], [1, 2]) == 0
    assert personal_privacy.auc([1, 1], [1, 1]) == 0.5
    assert personal_privacy.auc([1, 4], [2, 3]) == 0.5


@pytest.mark.long
def test_less_epsilon_takes_more_noise() -> None:
    noise = [personal_privacy.noise_of(epsilon, 1e-5) for epsilon in (8.0, 1.0)]
    assert 1 < noise[0] < noise[1]


CONTROLS = (
    *(ours(8, users=3, name=BESIDE), Arm(personal_arms.RANDOM, 4), Arm(personal_arms.FEDSB, 4)),
    *(Arm(personal_arms.FEDSA), Arm(LORA, own=2), Arm("vera", 4), Arm("unilora", 64), Arm("tinylora", 64)),
)
SOME = (*map(Arm, (BASE, SHARED, FULL, MORE)), ours(8, 1, users=3), ours(8, users=3, name=PROJECTED))


def test_a_study_of_a_tiny_model_goes_on_where_it_was_stopped(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"commit": "c" * 40}
    personal.study(ground, SOME[:4], where)
    before = personal.stored()["rows"]
    personal.study(ground, SOME, where)
    rows = personal.stored()["rows"]
    assert [one["losses"] for one in rows[:4]] == [one["losses"] for one in before]
    assert [one["key"] for one in rows] == [ground.key(str(arm)) for arm in SOME]
    by = {one["arm"]: one for one in rows}
    shapes = emulator.target_shapes(ground.base.model, ground.base.plan).values()
    assert by[FULL]["numbers"] == 8 * sum(map(sum, shapes))
    assert by[CORE]["numbers"] == sum(8 * 8 + o + i for o, i in shapes)
    assert by[PROJECTED]["numbers"] == 64 * len(shapes)
    assert by[MORE]["numbers"] == by[SHARED]["numbers"] == 0 == by[BASE]["bytes_down"]
    for one in rows:
        assert one["users"] == 2 and one["bytes_up"] >= 4 * one["numbers"]
        assert one["mean"] == pytest.approx(sum(one["losses"].values()) / 2)
    assert by[FULL]["losses"] != by[SHARED]["losses"]
    for bits, apart in ((32, 1e-5), (8, 1e-2)):
        made, losses = served_study.bundle_of(SOME[4], ground, bits=bits)
        assert made.users == ("user0", "user1")
        assert losses == pytest.approx(list(by[CORE]["losses"].values()), abs=apart)
    shutil.rmtree(ground.folder)  # what git ignores: another machine with the same text
    held = personal.own_of(Arm(FULL), ground)
    again = {
        who.id: ground.plain.judged(ground.text(who).heldout, ground.adapter(held[who.id]))
        for who in ground.roles.reported
    }
    assert again == pytest.approx(by[FULL]["losses"], abs=1e-5)
    monkeypatch.setattr(personal, "measured", None)  # nothing is missing
    personal.study(ground, SOME, where)


@pytest.mark.long
def test_controls_have_the_numbers_that_they_are_said_to_have(ground: Ground) -> None:
    personal.study(ground, (*SOME[:4], *CONTROLS), {"commit": ""})
    by = {one["arm"]: one for one in personal.stored()["rows"]}
    shapes = emulator.target_shapes(ground.base.model, ground.base.plan).values()
    assert by[BESIDE]["numbers"] == 64 * len(shapes)
    assert (
        by[personal_arms.RANDOM]["numbers"]
        == 16 * len(shapes)
        == by["vera"]["numbers"] - sum(o + 4 - 16 for o, _ in shapes)
    )
    assert by[personal_arms.FEDSA]["numbers"] == 8 * sum(o for o, _ in shapes)
    assert by[personal_arms.FEDSB]["numbers"] == 0 and by["unilora"]["numbers"] == 64
    assert by[LORA]["numbers"] == 2 * sum(map(sum, shapes)) and by["tinylora"]["numbers"] == 64 * len(shapes)
    assert all(by[arm.name]["mean"] < by[SHARED]["mean"] for arm in CONTROLS)  # each has learnt something


def test_numbers_of_one_projection_are_counted_and_told_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        personal_learnt, "LEARN", {"episodes": 2, "steps": 2, "rate": 1e-3, "core_rate": 0.06}
    )
    rounds = {"rounds": 4, "episode": 2, "steps": 2, "rate": 5e-3, "core_rate": 0.06}
    monkeypatch.setattr(personal_learnt, "ROUNDS", rounds)
    learnt, federated, random = (
        Arm(name, 4, basis_users=users, modules=DOWN)
        for name, users in ((LEARNT, 2), (FEDERATED, 2), (RANDOM, 0))
    )
    arms = Arm(SHARED), learnt, federated, random, Arm(LORA, own=1, modules=DOWN)
    personal.study(ground, arms, {"commit": ""})
    by = {one["arm"]: one for one in personal.stored()["rows"]}
    shapes = emulator.target_shapes(ground.base.model, ground.base.plan)
    down = {name: shape for name, shape in shapes.items() if name.endswith("down_proj")}
    assert 0 < len(down) < len(shapes)
    assert by[LEARNT]["numbers"] == by[RANDOM]["numbers"] == 16 * len(down)
    assert by[LORA]["numbers"] == sum(map(sum, down.values()))
    assert by[FEDERATED]["numbers"] == 16 * len(down)
    assert (
        by[FEDERATED]["bytes_down"] == by[LEARNT]["bytes_down"] > by[RANDOM]["bytes_down"]
    )  # which a seed gives
    for arm in arms[1:]:
        assert by[arm.name]["modules"] == list(DOWN) and by[arm.name]["mean"] < by[SHARED]["mean"]
    with torch.no_grad():  # what is served is the shared adapter and the core in one basis
        made, losses = served_study.bundle_of(learnt, ground, bits=32)
    assert losses == pytest.approx(list(by[LEARNT]["losses"].values()), abs=1e-5)
    assert made.users == ("user0", "user1")


def test_what_a_user_has_beside_the_shared_adapter_is_told_exactly_in_a_basis_of_it(ground: Ground) -> None:
    (own,) = ground.adapters(1).values()  # and shared are of rank 8, so that 16 directions are enough
    basis = ground.basis(16, 1, beside=True)
    told = CoreInBasis(from_lora(difference(own, ground.shared), basis).core, basis).to_lora()
    text = ground.text(ground.roles.basis[0]).heldout
    assert ground.beside.judged(text, told) == pytest.approx(ground.plain.judged(text, own), abs=1e-5)


def test_a_head_with_all_other_tokens_gives_the_loss_of_the_whole_one(ground: Ground) -> None:
    text, ids = ground.text(ground.roles.basis[0]).train, ground.words.ids
    whole = mean_loss(ground.plain.seen, ground.base.plan, text, adapter=ground.shared)
    size = ground.base.model.config.vocab_size
    assert len(ids) < size
    losses = []
    for others in (0, size // 8, size):
        words = Words(ids, others=others)
        top = words.cut(ground.plain.seen)
        losses.append(mean_loss(top, ground.base.plan, words.told(text), adapter=ground.shared))
    none, some, every = losses
    assert every == pytest.approx(whole, abs=1e-5)
    assert none < whole - 0.1 and abs(some - whole) < whole - none


def test_a_row_of_other_settings_does_not_stand_beside_a_new_one(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    personal.study(ground, SOME[:2], {"commit": ""})
    monkeypatch.setattr(personal, "SETTINGS", {**personal.SETTINGS, "edition": 0})
    personal.study(ground, SOME[:1], {"commit": ""})  # its key is of the ground's settings: it is there
    assert len(personal.stored()["rows"]) == 2
    personal.add({"arm": "new", "corpus": "other", "losses": {}, "key": ""}, ground, {"commit": ""})
    assert [row["arm"] for row in personal.stored()["rows"]] == ["new"]


def test_text_of_another_machine_is_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    personal.study(ground, SOME[:1], {"commit": ""})
    personal.refuse_other_ground(ground)
    other = Ground("stdlib", Sizes(3, 2, 2, least=8), ground.base, folder=ground.folder)
    with pytest.raises(click.ClickException, match="rows of stdlib from other text"):
        personal.refuse_other_ground(other)
    told = personal.stored()
    told["corpora"]["stdlib"]["packages"] = ["bash", "dpkg"]
    other.packages = ["dpkg"]
    with monkeypatch.context() as patch:
        patch.setattr(personal, "stored", lambda: told)
        with pytest.raises(click.ClickException, match="on this machine; install bash, take its rows out"):
            personal.refuse_other_ground(other)


def test_rows_that_began_elsewhere_are_not_gone_on_with(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    personal.study(ground, SOME[:1], {"commit": ""})
    (one,), told = personal.stored()["rows"], personal.stored()["corpora"]["stdlib"]
    assert one["compute"] == "float32" and told["shared"] == ground.shared.content_hash()[:12]
    known = {"rows": [{**one, "compute": "bfloat16"}], "corpora": {"stdlib": told}}
    monkeypatch.setattr(personal, "stored", lambda: known)
    with pytest.raises(click.ClickException, match="trained in bfloat16, this is float32: go on with"):
        personal.refuse_other_ground(ground)
    known = {"rows": [one], "corpora": {"stdlib": {**told, "shared": "0" * 12}}}
    with pytest.raises(click.ClickException, match=f"begin at shared adapter 0{{12}}, .* {told['shared']}"):
        personal.refuse_other_ground(ground)
    known = {"rows": [], "corpora": {"stdlib": {**told, "shared": "0" * 12}}}
    personal.refuse_other_ground(ground)  # nothing stands beside it


@pytest.mark.parametrize("name", [CORE, BESIDE])
@pytest.mark.long
def test_what_is_told_of_privacy_begins_at_what_was_trained(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arm = ours(8, users=3, name=name)
    personal.study(ground, (Arm(FULL), arm), {"commit": ""})
    monkeypatch.setattr(personal_privacy, "ATTACKED", (arm,))
    monkeypatch.setattr(personal_privacy, "NOISED", (arm,))
    monkeypatch.setattr(personal_privacy, "EPSILONS", (None, 1.0))
    monkeypatch.setattr(personal_privacy, "CLIPS", (1.0, 0.1))
    personal_privacy.measure(ground, {"commit": ""})
    found = personal.stored()
    without, noised = found["private"]
    (trained,) = [one for one in found["rows"] if one["arm"] == name]
    assert without["losses"] == pytest.approx(trained["losses"]) and without["noise"] == 0
    assert noised["noise"] > 5 and noised["clip"] > 0 and noised["losses"] != without["losses"]
    (attack,) = found["membership"]
    assert set(attack["auc"]) == set(trained["losses"]) and 0 <= attack["mean"] <= 1


def test_the_page_names_every_arm_and_says_what_does_not_win() -> None:
    names = {personal_page.name_of(vars(arm) | {"arm": arm.name}) for block in BLOCKS for arm in block}
    assert len(names) == sum(map(len, BLOCKS))
    told = [{**one, "k": 8, "own": 0, "basis_users": 24, "users": 3} for one in ROWS]
    wins = personal_page._finding("stdlib", compared(told))
    assert "smallest form that keeps 95 %" in wins and "10.0x fewer" in wins
    told[3]["losses"] = told[4]["losses"] = {"a": 1.9, "b": 1.9, "c": 2.0}
    assert "**no** form of ours" in personal_page._finding("stdlib", compared(told))
    assert "no core has been measured" in personal_page._finding("stdlib", compared(told[:3]))
    told[2]["losses"] = told[0]["losses"]
    assert "wins nothing over shared" in personal_page._finding("stdlib", compared(told))


def test_the_page_says_which_arms_have_no_row() -> None:
    every = [arm for block in BLOCKS for arm in block]
    rows = [{**vars(arm), "arm": arm.name, "corpus": "stdlib"} for arm in every]
    assert personal_page._missing(rows) == ""
    learnt = sum(arm.name == LEARNT for arm in every)
    some = [row for row in rows if row["arm"] not in (LEARNT, FULL)]
    told = personal_page._missing(some)
    assert told == f"Not measured yet on stdlib with these settings: full LoRA, learnt basis ({learnt}).\n\n"
