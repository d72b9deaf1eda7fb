"""Losses measured on users' own nodes: what the nodes are asked, and what is made of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soppu.evaluate.losses import CURRENT, EMULATOR
from soppu.federation import connection
from soppu.federation.connection import Remote
from soppu.federation.personalise import BASE, PERSONAL
from soppu.stages import elsewhere
from soppu.stages.run import CONFIG, FEDERATION, Run
from tests.soppu.stages.conftest import write_result

BUNDLE = "ab" * 32
NUMBERS = {"num-examples": 4.0, "loss-base": 3.0, "loss-personal": 2.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Remote]:
    """What is asked of a SuperLink whose nodes answer: ann with all, cleo without a bundle, bob not."""
    found: list[Remote] = []

    def answer(remote: Remote, **_: Any) -> dict[str, Any]:
        found.append(remote)
        whole = NUMBERS | {"loss-compressed": 2.1, "loss-shared": 2.5}
        return {"losses": {"cleo": NUMBERS, "ann": whole}, "refused": {"bob": "no answer in 60 s"}}

    monkeypatch.setattr(connection, "run", answer)
    return found


def test_the_order_names_everybody_s_adapters_and_who_is_in_the_bundle(
    run: Run, trained: dict[str, str], asked: list[Remote]
) -> None:
    write_result(run, {**trained, "ann": trained["bob"]}, cleo=BASE)
    elsewhere.measure(run, trained, BUNDLE)
    (remote,) = asked
    assert (remote.task, remote.config) == ("evaluate", run.folder / CONFIG)
    assert (
        remote.app / "pyproject.toml"
    ).exists() and remote.workdir == run.folder / f"measured-{BUNDLE[:16]}"
    order = json.loads((remote.workdir / "order.json").read_text())
    assert order["bundle"] == BUNDLE and order["compressed"] == ["ann", "bob"]
    assert order["adapters"] == {**trained, "ann": trained["bob"]}  # as the federation left them, not the set
    assert Path(order["shared"]) == (run.folder / FEDERATION).resolve() / "shared"
    assert Path(order["federation"]) == (run.folder / FEDERATION).resolve()


def test_answers_are_losses_and_who_did_not_answer_is_left_out_and_logged(
    run: Run, trained: dict[str, str], asked: list[Remote], caplog: pytest.LogCaptureFixture
) -> None:
    write_result(run, trained, cleo=BASE)
    ann, cleo = elsewhere.measure(run, trained, BUNDLE)
    assert (ann.user, ann.examples, ann.served, ann.measured_on) == ("ann", 4, PERSONAL, EMULATOR)
    assert (ann.base, ann.personal, ann.compressed, ann.shared) == (3.0, 2.0, 2.1, 2.5)
    assert (cleo.served, cleo.compressed, cleo.shared) == (BASE, 3.0, None)  # is answered by the base model
    assert "not measured: bob: no answer in 60 s" in caplog.text


def test_without_a_federation_only_the_set_is_known(
    run: Run, trained: dict[str, str], asked: list[Remote]
) -> None:
    ann, cleo = elsewhere.measure(run, trained, BUNDLE)
    order = json.loads((asked[0].workdir / "order.json").read_text())
    assert order["adapters"] == trained and order["compressed"] == list(trained)
    assert order["shared"] == order["federation"] == "" and ann.served == cleo.served == CURRENT
