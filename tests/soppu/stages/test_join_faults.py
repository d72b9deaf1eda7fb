"""Joins that meet: each other, publications, a kill at any point, a rollback, a user who was forgotten."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from soppu.compress.joining import bases_of
from soppu.compress.joining import join as row_of
from soppu.cores import core as cores
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.data import load_user
from soppu.errors import BundleError, TargetError
from soppu.progress.events import BEGAN, DONE, Reader
from soppu.progress.followed import Followed
from soppu.registry import Registry
from soppu.stages import join as stage
from soppu.stages.federate import shared_adapter
from soppu.stages.join import Newcomer, join
from soppu.stages.join_ground import Ground
from soppu.stages.publish import Held, publish
from soppu.stages.report import write_report
from soppu.stages.run import Run
from soppu.stages.targets import open_target
from soppu.targets.http import HttpTarget
from tests.soppu.stages.joiners import a_fleet, bundle_of, fleet, overrides, text_of

__all__ = ["fleet", "overrides"]
STEPS = (
    (Registry, "put_adapter"),
    (Registry, "freeze"),
    (Registry, "put_bundle"),
    (HttpTarget, "publish"),
    (HttpTarget, "canary"),
    (HttpTarget, "activate"),
    (Registry, "record_publication"),
    (HttpTarget, "complete"),
)


class Killed(BaseException):
    """As a signal would end it: nothing here catches it."""


def newcomer(user: str, folder: Path) -> Newcomer:
    return Newcomer(user, str(text_of(user, folder)))


def served(run: Run) -> tuple[str, ...]:
    """Who is served, as the registry and the server agree."""
    live = open_target(run).active()
    assert run.registry().live(run.config.serve.url) == live
    return bundle_of(run, live).users


@pytest.mark.long
def test_joins_at_once_take_turns_and_none_takes_the_other_back(run: Run, fleet: str, tmp_path: Path) -> None:
    folder, registry = str(run.folder), run.registry()
    waiting, going_on = threading.Event(), threading.Event()

    def told(said: dict[str, Any]) -> None:
        if said["share"] >= 0.6:  # it is judged; what is live has been looked at
            waiting.set()
            going_on.wait(60)

    with ThreadPoolExecutor(3) as pool:
        eve = pool.submit(join, folder, newcomer("eve", tmp_path), on_progress=told)
        assert waiting.wait(60)
        with registry.publishing(run.config.serve.url):
            dora = pool.submit(join, folder, newcomer("dora", tmp_path))
            twice = pool.submit(join, folder, newcomer("dora", tmp_path))
            # somebody else publishes meanwhile: a user more in the same bases
            before = bundle_of(run, fleet)
            (basis,) = bases_of(before)
            zoe = CoreInBasis(cores.zero(basis), basis)
            made = row_of(before, "zoe", zoe).bundle
            own = registry.put_adapter(zoe.to_lora(), user="zoe", run=run.id)
            set_id = registry.freeze(dict(zip(made.users, (*before.adapter_ids, own), strict=True)))
            bundle_id = registry.put_bundle(made.to_bytes(), set_id=set_id, run=run.id)
            publish(folder, bundle_id, run.newest_evaluation(), held=Held(("zoe",)))
        going_on.set()
        assert eve.result(120).before != fleet
        errors = [one.exception(120) for one in (dora, twice)]
    refused = [error for error in errors if error]
    assert len(refused) == 1 and isinstance(refused[0], BundleError)
    assert "user 'dora' is in bundle" in str(refused[0])
    assert set(served(run)) == {"ann", "bob", "cleo", "dora", "eve", "zoe"}


@pytest.mark.long
def test_a_join_that_was_killed_anywhere_is_repeated_and_shown(
    run: Run, fleet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, who = str(run.folder), newcomer("dora", tmp_path)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    for kind, name in STEPS:
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, killed)
            with pytest.raises(Killed):
                join(folder, who)
        assert {"ann", "bob", "cleo"} <= set(bundle_of(run, open_target(run).active()).users)
    with stage.as_run(folder, who):
        done = join(folder, who)
    assert done.again and done.first_token and served(run) == ("ann", "bob", "cleo", "dora")
    assert run.read(done.file)["first_token"] == done.first_token
    # whoever watches the folder sees the join, in stages of its own
    seen = Followed(run.folder).look()
    assert seen.ended == DONE and seen.stages["join dora"].state == DONE
    began = [event for event in Reader(run.folder / "progress.jsonl").read() if event.state == BEGAN]
    assert [event.stage for event in began].count("join dora") == len(STEPS) + 1
    other = tmp_path / "other"
    other.mkdir()
    text = text_of("doris", other).rename(other / "dora.jsonl")
    with pytest.raises(BundleError, match="user 'dora' is in bundle .* already"):
        join(folder, Newcomer("dora", str(text)))


@pytest.mark.long
def test_after_a_rollback_and_after_being_forgotten_a_user_joins_again(
    run: Run, fleet: str, tmp_path: Path
) -> None:
    folder, registry, url = str(run.folder), run.registry(), run.config.serve.url
    first = join(folder, newcomer("dora", tmp_path))
    report = write_report(folder, run.newest_evaluation()).html.read_text()
    assert "dora" in report and url in report  # the publication of the join is the run's
    back_to(run, fleet)
    assert served(run) == ("ann", "bob", "cleo")
    again = join(folder, newcomer("dora", tmp_path))
    assert (again.bundle_id, again.core_id) == (first.bundle_id, first.core_id) and not again.again
    registry.forget("dora")
    with pytest.raises(TargetError, match="holds a user who was forgotten; compress again without them"):
        join(folder, newcomer("eve", tmp_path))
    back_to(run, fleet)
    join(folder, newcomer("eve", tmp_path))
    join(folder, newcomer("dora", tmp_path))
    assert served(run) == ("ann", "bob", "cleo", "eve", "dora")


def back_to(run: Run, bundle_id: str) -> None:
    """As `soppu rollback` does it."""
    registry, url = run.registry(), run.config.serve.url
    with registry.publishing(url):
        target = open_target(run)
        target.publish(registry.bundle_path(bundle_id), bundle_id=bundle_id)
        target.activate(bundle_id)
        registry.record_publication(target="embedded", url=url, bundle_id=bundle_id)


def test_of_several_bases_a_newcomer_takes_the_one_their_validation_text_is_best_in(
    run: Run, fleet: str, tmp_path: Path
) -> None:
    (useful,) = bases_of(bundle_of(run, fleet))
    sides = {name: (torch.zeros_like(u), v) for name, (u, v) in useful.sides.items()}
    useless = dataclasses.replace(useful, sides=sides)
    data = dataclasses.replace(run.config.data, source=str(text_of("dora", tmp_path)), users=("dora",))
    for bases, best in (([useless, useful], 1), ([useful, useless], 0), ([useless], 0)):
        ground = Ground.of(run, load_user(data, "dora"), bases, shared=None)
        assert ground.best_basis(bases, own_rank=0) == best


def test_what_all_share_stays_with_a_newcomer_who_has_it_and_is_learnt_by_one_who_has_not(
    run: Run, fleet: str, tmp_path: Path
) -> None:
    (plain,) = bases_of(bundle_of(run, fleet))
    basis = dataclasses.replace(plain, common=1)
    data = dataclasses.replace(run.config.data, source=str(text_of("dora", tmp_path)), users=("dora",))
    shared = shared_adapter(run)
    assert shared is not None
    for known in (shared, None):
        ground = Ground.of(run, load_user(data, "dora"), [basis], shared=known)
        found = ground.trained(basis, own_rank=0).adapter
        assert found.core.basis_id == found.basis.id == basis.id
        begun = from_lora(shared, basis).core if known else cores.zero(basis)
        same = [
            torch.equal(core[:1], begun.cores[name][:1])
            and torch.equal(core[:, :1], begun.cores[name][:, :1])
            for name, core in found.core.cores.items()
        ]
        assert all(same) if known else not any(same)
        assert found.core.content_hash() != begun.content_hash()


@pytest.mark.long
def test_who_joins_a_bundle_of_several_bases_is_a_row_in_the_one_that_was_chosen(
    trained: dict[str, str],
    reconfigured: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = reconfigured(compress={"method": "cluster", "clusters": 2, "rank": 8, "ratio": 0.0})
    bundle_id = a_fleet(run, trained)
    monkeypatch.setattr(Ground, "best_basis", lambda *_, **__: 1)
    joined = join(str(run.folder), newcomer("dora", tmp_path))
    after = bundle_of(run, joined.bundle_id)
    first, second = bases_of(after)
    assert joined.before == bundle_id and joined.cluster == int(after.cluster[-1]) == 1
    assert joined.basis_id == second.id != first.id
