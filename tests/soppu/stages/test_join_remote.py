"""Users who join at a server, from a machine without the run, and a registry that takes them over later."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soppu.cli import main
from soppu.cores import folder as core_folder
from soppu.errors import TargetError
from soppu.stages.join import Newcomer, join
from soppu.stages.join_collect import collect_joins
from soppu.stages.publish import publish
from soppu.stages.report import write_report
from soppu.stages.run import FEDERATION, Run
from soppu.stages.targets import open_target
from soppu.targets import joins
from tests.soppu.stages.joiners import bundle_of, fleet, overrides, text_of

__all__ = ["fleet", "overrides"]


def at_the_server(run: Run, user: str, folder: Path, *more: str) -> Result:
    """`soppu join --url` as a client calls it, who has the fleet's configuration and shared adapter."""
    words = ["join", user, "--data", str(text_of(user, folder)), "--url", run.config.serve.url]
    words += ["--config", str(run.folder / "config.toml"), "--state", run.config.serve.state]
    words += ["--shared", str(run.folder / FEDERATION / "shared"), "--out", str(folder / "client")]
    return CliRunner().invoke(main, [*words, *more])


def test_who_joins_at_a_server_comes_into_the_registry_with_the_bundle_that_is_served(
    run: Run, fleet: str, tmp_path: Path
) -> None:
    folder, registry, url = str(run.folder), run.registry(), run.config.serve.url
    done = at_the_server(run, "dora", tmp_path)
    assert done.exit_code == 0, done.output
    assert f"dora at {url}" in done.output and "upload and row" in done.output
    target = open_target(run)
    served, (kept,) = target.active(), joins.kept(target)
    assert kept.user == "dora" and registry.live(url) == fleet
    assert core_folder.read(tmp_path / "client" / "cores" / kept.core_id).id == kept.core_id
    # nothing is published over people whom no registry has
    with pytest.raises(
        TargetError, match="1 users joined there and are in no registry yet, 'dora' among them"
    ):
        publish(folder, fleet, run.newest_evaluation())
    assert target.active() == served
    taken = CliRunner().invoke(main, ["admit", "--run", folder])
    assert taken.exit_code == 0 and "1 users came into the registry: dora" in taken.output
    assert registry.live(url) == served == target.active() and joins.kept(target) == []
    assert bundle_of(run, served).users == ("ann", "bob", "cleo", "dora") == tuple(registry.current_set())
    assert registry.current("dora") == kept.core_id
    (row,) = registry.history("dora")
    assert row.metrics["loss_personal"] <= row.metrics["loss_base"] and row.run == run.id
    assert url in write_report(folder, run.newest_evaluation()).html.read_text()
    assert collect_joins(folder) == []


@pytest.mark.long
def test_joins_of_both_kinds_build_on_each_other(run: Run, fleet: str, tmp_path: Path) -> None:
    folder, registry, url = str(run.folder), run.registry(), run.config.serve.url
    for user in ("dora", "eve"):
        assert at_the_server(run, user, tmp_path).exit_code == 0
    target = open_target(run)
    served = target.active()
    assert [one.user for one in joins.kept(target)] == ["dora", "eve"]
    assert collect_joins(folder) == ["dora", "eve"] and registry.live(url) == served
    third = join(folder, Newcomer("fay", str(text_of("fay", tmp_path))))
    assert third.before == served
    again = at_the_server(run, "dora", tmp_path, "--own-rank", "1")
    assert again.exit_code == 1 and "user 'dora' is in the active bundle already" in again.output
    assert at_the_server(run, "dora", tmp_path, "--own-rank", "1", "--replace").exit_code == 0
    # a join by the run takes over who came at the server meanwhile
    join(folder, Newcomer("gil", str(text_of("gil", tmp_path))))
    assert registry.live(url) == target.active() and joins.kept(target) == []
    assert set(bundle_of(run, target.active()).users) == {"ann", "bob", "cleo", "dora", "eve", "fay", "gil"}
    assert len(registry.history("dora")) == 2


@pytest.mark.long
def test_who_was_forgotten_after_joining_at_a_server_does_not_come_back(
    run: Run, fleet: str, tmp_path: Path
) -> None:
    folder, registry = str(run.folder), run.registry()
    registry.put_adapter(registry.get_adapter(registry.current("ann")), user="dora", run=run.id)
    for user in ("dora", "eve"):
        assert at_the_server(run, user, tmp_path).exit_code == 0
    registry.forget("dora")
    assert collect_joins(folder) == ["eve"]
    assert set(registry.current_set()) == {"ann", "bob", "cleo", "eve"}
    assert registry.live(run.config.serve.url) == fleet and joins.kept(open_target(run)) == []


def test_a_client_is_told_what_is_missing(run: Run, fleet: str, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = CliRunner().invoke(main, ["join", "dora", "--data", str(text_of("dora", tmp_path)), *words])
        assert done.exit_code in (1, 2)
        return done.output

    assert "one of --run and --url is needed" in said()
    assert "one of --run and --url is needed" in said("--run", str(run.folder), "--url", "http://x")
    assert "--replace goes with --url" in said("--run", str(run.folder), "--replace")
    config = str(run.folder / "config.toml")
    assert "nobody answers there" in said("--url", "http://127.0.0.1:9", "--config", config)
    url = run.config.serve.url
    assert "an admin token is needed" in said("--url", url, "--config", config)
    state = run.config.serve.state
    open_target(run).rollback("")
    assert "no bundle is active here" in said("--url", url, "--config", config, "--state", state)
