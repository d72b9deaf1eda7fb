"""A new user joins a fleet that is served: one row more, nobody else touched, and a token at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from soppu.cli import main
from soppu.compress.joining import basis_of
from soppu.cores.core import CoreInBasis
from soppu.errors import BundleError, ConfigError, DataError, GateError, SoppuError
from soppu.evaluate.gate import check
from soppu.stages.join import Joined, Newcomer, join
from soppu.stages.published import serving_file
from soppu.stages.run import Run, prepare
from soppu.stages.targets import open_target
from tests.soppu.stages.joiners import bundle_of, fleet, overrides, text_of

__all__ = ["fleet", "overrides"]

JUDGED, UNJUDGED = "loss of personal <= 1 of shared", "bleu of personal >= 0.9 of shared"


def text_that_turns(folder: Path) -> Path:
    """Its newest quarter, which is held out, has letters that the rest never has."""
    lines = [
        {"text": f"{n:06b}".translate({48: old, 49: new}) * 4, "date": f"2024-01-{n:02}"}
        for n in range(1, 29)
        for old, new in [("ab" if n < 22 else "zq")]
    ]
    path = folder / "turning.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def nobody_joins_who_must_not(run: Run, fleet: str, tmp_path: Path) -> None:
    """Neither with too little text nor with a core that is worse; then nothing is stored or published."""
    refused: list[tuple[Path, type[SoppuError], str]] = [
        (tmp_path / "short.jsonl", DataError, "'dora' has .* examples to train on")
    ]
    refused[0][0].write_text(json.dumps({"prompt": "a", "completion": "b"}))
    worse = r"join: dora's core has .* nats a token on held-out text, the base model .* allowed: 0.01 more"
    refused.append((text_that_turns(tmp_path), GateError, worse))
    members = run.registry().current_set()
    for path, error, message in refused:
        with pytest.raises(error, match=message):
            join(str(run.folder), Newcomer("dora", str(path)))
    assert run.registry().live(run.config.serve.url) == fleet and run.registry().current_set() == members


def joined_by_rules(
    run: Run, newcomer: Newcomer, reconfigured: Callable[..., Run], notes: list[float]
) -> Joined:
    """What comes of a join under rules on arms: one is judged, one has to be waived; `notes` gets shares."""
    reconfigured(gate={"rules": (JUDGED, UNJUDGED)}, evaluate={"arms": ("shared", "personal")})
    with pytest.raises(GateError, match=f"{UNJUDGED}': one user who joins has no such figure.*--waive-rules"):
        join(str(run.folder), newcomer)
    first = join(
        str(run.folder),
        dataclasses.replace(newcomer, waive_rules=True),
        on_progress=lambda told: notes.append(told["share"]),
    )
    written = run.read(f"join-dora-{first.core_id}.json")
    assert written["rules"] == first.rules == {JUDGED: "judged", UNJUDGED: "waived"}
    assert (written["url"], written["first_token"]) == (run.config.serve.url, first.first_token)
    reconfigured()
    assert list(run.read(serving_file("embedded"))["canaries"]) == ["dora", "ann", "bob", "cleo"]
    return first


def test_who_is_no_worse_joins_one_after_the_other_and_everybody_is_served(
    run: Run,
    fleet: str,
    config_path: Path,
    overrides: dict[str, object],
    reconfigured: Callable[..., Run],
    tmp_path: Path,
) -> None:
    reconfigured(federation={"personal_steps": 60})  # enough of them to make it worse
    nobody_joins_who_must_not(run, fleet, tmp_path)
    reconfigured()
    other = prepare(str(config_path), {**overrides, "seed": 7})
    newcomer = Newcomer("dora", str(text_of("dora", tmp_path)))
    with pytest.raises(BundleError, match=rf"serves bundle {fleet[:12]} of run '{run.id}', not of 'three-"):
        join(other, newcomer)

    notes: list[float] = []
    first = joined_by_rules(run, newcomer, reconfigured, notes)
    said = CliRunner().invoke(
        main,
        ["join", "eve", "--data", str(text_of("eve", tmp_path)), "--run", str(run.folder), "--own-rank", "1"],
    )
    assert said.exit_code == 0, said.output
    assert "sample completion" in said.output and "eve at http://127.0.0.1" in said.output
    registry, before = run.registry(), bundle_of(run, fleet)
    live = registry.live(run.config.serve.url)
    after = bundle_of(run, live)
    assert after.users == ("ann", "bob", "cleo", "dora", "eve") == tuple(registry.current_set())
    assert [one.data for one in after.pages[: len(before.pages)]] == [one.data for one in before.pages]
    assert basis_of(after).id == basis_of(before).id == first.basis_id
    assert notes == sorted(notes) and notes[-1] == 1.0
    assert list(first.seconds) == [
        "text and bundle",
        "base model",
        "frozen layers",
        "training",
        "check",
        "store",
        "push",
        "canaries",
        "sample completion",
        "first token",
    ]
    assert first.losses["compressed"] == pytest.approx(first.losses["personal"], abs=1e-4)
    assert first.losses["compressed"] < min(first.losses["base"], first.losses["shared"])
    # what is served is the core that was trained, which the registry has as a core
    assert registry.current("dora") == first.core_id == after.adapter_ids[3]
    core = registry.get_core(first.core_id)
    lora = CoreInBasis(core, basis_of(after)).to_lora()
    for name, pair in after.reconstruct("dora").pairs.items():
        torch.testing.assert_close(pair.delta(), lora.pairs[name].delta(), rtol=1e-4, atol=1e-5)
    target = open_target(run)
    assert target.active() == live
    told = {user: target.complete("say 3: ", user=user, max_new_tokens=6) for user in ("", *after.users)}
    assert told["dora"] != told[""] and told["eve"] != told["dora"]
    assert join(str(run.folder), newcomer).again  # by the same text: nothing is left to do
    with pytest.raises(BundleError, match=f"user 'dora' is in bundle {live[:12]} already"):
        join(str(run.folder), dataclasses.replace(newcomer, own_rank=1))


def test_what_is_missing_is_told_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    text = str(text_of("dora", tmp_path))
    with pytest.raises(ConfigError, match="the run has no bundle yet"):
        join(str(run.folder), Newcomer("dora", text))
    with pytest.raises(ConfigError, match="own_rank = 5, allowed: 0 to 4"):
        join(str(run.folder), Newcomer("dora", text, own_rank=5))
    with pytest.raises(DataError, match="user id 'a/b', allowed: 1 to 128"):
        join(str(run.folder), Newcomer("a/b", text))
    verdict = check([], {}, run.config.gate).to_dict()
    run.write("evaluation-x.json", {"bundle_id": "x", "verdict": verdict})
    with pytest.raises(GateError, match="no user's held-out loss was measured"):
        join(str(run.folder), Newcomer("dora", text))
