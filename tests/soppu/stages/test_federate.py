"""When a federation is run, waited for, or taken as it is found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from soppu import files
from soppu.federation import simulation
from soppu.stages import federate
from soppu.stages.run import Run

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


def test_a_second_run_of_the_same_training_waits_for_the_first_and_takes_what_it_made(
    run: Run, trained: dict[str, str]
) -> None:
    with ThreadPoolExecutor() as pool:
        with files.exclusive(run.folder / "federation" / "lock"):  # the first is at it
            second = pool.submit(federate.federate, str(run.folder))
            with pytest.raises(TimeoutError):
                second.result(timeout=0.5)
            run.write(federate.RESULT, {"adapters": trained})
        assert second.result(timeout=60) == federate.federate(str(run.folder))
    assert not (run.folder / "federation" / "flower.log").exists()  # nor did it start one of its own


@pytest.mark.parametrize(
    ("least", "last", "again"),
    [
        (1, {"refused": {"bob": "died"}, "lost": ["bob"]}, False),
        (0, {"refused": {"bob": "died"}, "lost": ["bob"]}, True),
        (0, {"refused": {}, "lost": []}, True),  # was not there at all
        (0, {"refused": {"bob": "NaN"}, "lost": []}, False),  # everybody answered
        (3, {"refused": {}, "lost": []}, True),
    ],
)
def test_what_a_run_that_asked_for_fewer_users_left_is_not_enough_for_one_that_wants_all(
    run: Run, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch, least: int, last: Any, again: bool
) -> None:
    started: list[simulation.Simulation] = []

    def simulated(wanted: simulation.Simulation, **_: Any) -> dict[str, Any]:
        started.append(wanted)
        return {"adapters": trained}

    monkeypatch.setattr(simulation, "run", simulated)
    config = (run.folder / "config.toml").read_text()
    (run.folder / "config.toml").write_text(config.replace("min_users = 0", f"min_users = {least}"))
    few = {user: held for user, held in trained.items() if user != "bob"}
    run.write(federate.RESULT, {"adapters": few, "rounds": [last]})
    federate.federate(str(run.folder))
    assert bool(started) is again
