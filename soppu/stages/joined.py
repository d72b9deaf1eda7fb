"""Who joins, and what comes of it: the values that the parts of a join hand on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from soppu.config import TargetConfig
from soppu.cores.core import MOST_OWN
from soppu.errors import ConfigError, DataError
from soppu.evaluate.losses import COLUMNS, UserLosses
from soppu.progress.telling import Tell
from soppu.stages.join_notes import file_of
from soppu.stages.run import Run
from soppu.user_ids import ALLOWED, is_id

FOLDER = "cores"  # of a client's folder: cores of who joined from there, by id


@dataclass(frozen=True)
class Newcomer:
    """Who joins, with what, and where they are served."""

    user: str
    file: str  # their text, in any format and layout of `soppu.data`
    own_rank: int = 0  # beside the core, in every module
    target: str = ""  # a serving target of the run; "" is its first
    waive_rules: bool = False  # those of the gate on arms that one user alone has no figure of

    def check(self) -> None:
        """ConfigError: `own_rank` out of its range; DataError: the user's id is none."""
        if not 0 <= self.own_rank <= MOST_OWN:
            raise ConfigError(f"own_rank = {self.own_rank}, allowed: 0 to {MOST_OWN}")
        if not is_id(self.user):
            raise DataError(f"user id {self.user!r}, allowed: {ALLOWED}")


@dataclass
class Joined:
    """What came of it; `seconds` has the clock of each part, in order."""

    user: str
    bundle_id: str = ""
    before: str = ""  # the bundle that the user was added to
    core_id: str = ""
    basis_id: str = ""
    adapter_id: str = ""
    text: str = ""  # digest of what was read of the user's text
    own_rank: int = 0
    cluster: int = 0  # whose bases the core lies in
    url: str = ""
    steps: int = 0
    numbers: int = 0  # that were trained
    added: int = 0  # bytes of the user's page
    losses: dict[str, float] = field(default_factory=dict)  # held out, nats a token, by arm
    first_token: str = ""
    again: bool = False  # an earlier join by the same text had come to this
    rules: dict[str, str] = field(default_factory=dict)  # of `gate.rules`: judged, or waived
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Note how long a part takes."""
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started

    @property
    def file(self) -> str:
        """The file of the run's folder that tells of it."""
        return file_of(self.user, self.core_id)

    def metrics(self) -> dict[str, float]:
        """What a registry keeps of it beside the adapter."""
        return {f"loss_{name}": loss for name, loss in self.losses.items()} | {"steps": float(self.steps)}

    def measured(self, losses: UserLosses) -> None:
        """Take over the arms' losses."""
        self.losses = {name: loss for name in COLUMNS if (loss := getattr(losses, name)) is not None}


@dataclass(frozen=True)
class At:
    """The run and the target, and who is told how far it is."""

    run: Run
    settings: TargetConfig
    tell: Tell
