"""Noise at the client or at the server, end to end: what it hides, and what every release costs."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.app import Message

from soppu import config as configuration
from soppu.federation import privacy
from soppu.registry import Registry
from tests.server.grid import InProcessGrid
from tests.server.mode_runs import NODES, ROUNDS, Start, start
from tests.server.small_run import Killed, result, round_of

__all__ = ["start"]
# other tests cover the same lines; tracing takes a third of the time
pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("flower_identity", "fresh_workbench")]


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
