"""A run written down by hand, with everything in it that a run can tell of."""

from __future__ import annotations

from soppu.progress.events import BEGAN, DONE, FAILED, GOING, RUN, WARNED, Event

STAGES = ("prepare", "federate", "collect", "compress", "publish embedded")


def event(at: float, stage: str, state: str = GOING, **known: object) -> Event:
    return Event(1000.0 + at, stage, state, pid=7, **known)  # type: ignore[arg-type]


def at_round(at: float, number: int, share: float, note: str = "", **known: object) -> Event:
    said = note or f"round {number} of 3"
    return event(at, "federate", note=said, share=share, round=number, rounds=3, **known)


RECORDED = [
    event(0, RUN, BEGAN, stages=STAGES, of="flow-1", machine="elsewhere"),
    event(0, "prepare", DONE, seconds=4.2),
    event(1, "federate", BEGAN),
    event(2, "federate", note="aligning the emulator", share=0.05),
    at_round(10, 1, 0.1),
    at_round(14, 1, 0.2, "round 1 of 3: 1 of 2 users", user="ann"),
    event(15, "federate", FAILED, note="FederationError: killed\nlog line", seconds=14.0),
    event(17, "federate", BEGAN),
    at_round(20, 2, 0.4),
    at_round(25, 2, 0.5, "round 2 of 3: 1 of 2 users", user="bob"),
    event(30, "federate", WARNED, note="cleo: no answer in time"),
    at_round(30, 3, 0.6),
    event(262, "federate", DONE, seconds=245.0),
    event(262, "compress", BEGAN),
    event(263, "compress", note="compressed 3 users", share=1.0),
    event(263, "compress", DONE, seconds=1.4),
    event(263, "publish embedded", BEGAN),
    event(270, "publish embedded", FAILED, note="TargetError: nobody answers", seconds=7.0),
    event(270, RUN, FAILED, note="TargetError: nobody answers", seconds=270.0),
]
LINES = [
    "run: prepare, federate, collect, compress, publish embedded",
    "prepare: done in 4 s",
    "federate: round 1 of 3",
    "federate: failed after 14 s: FederationError: killed",
    "federate: begins again",
    "federate: round 2 of 3",
    "federate: warning: cleo: no answer in time",
    "federate: round 3 of 3",
    "federate: done in 4:05",
    "compress: done in 1 s: compressed 3 users",
    "publish embedded: failed after 7 s: TargetError: nobody answers",
    "run: failed after 4:30: TargetError: nobody answers",
]
