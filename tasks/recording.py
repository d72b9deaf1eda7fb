"""What every task shares: its cache key, when a retry makes sense, what it notes and what it logs."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.tasks import Task

from soppu.errors import (
    AdapterError,
    BundleError,
    ConfigError,
    DataError,
    GateError,
    MissingExtra,
    SandboxError,
    UnsupportedModel,
)
from soppu.progress import telling
from soppu.stages import join
from soppu.stages.join import Newcomer
from soppu.stages.report import stage_names
from soppu.stages.run import open_run

_log = logging.getLogger(__name__)
_HOPELESS = (
    ConfigError,
    DataError,
    GateError,
    UnsupportedModel,
    AdapterError,
    BundleError,
    MissingExtra,
    SandboxError,
)


def stage_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache key: the stage, its parameters, and everything else that its result follows from.

    Parameters are content hashes, so equal ones mean equal work, once what they do not name is equal too:
    text, settings, base model, and the run folder and registry, whose identity changes when they are wiped
    or a user is forgotten.
    """
    values = [context.task.name, open_run(parameters["run"]).inputs(context.task.name), parameters]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what another attempt could mend; a wrong configuration stays wrong."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, _HOPELESS)


@contextmanager
def recorded(run: str, name: str) -> Iterator[None]:
    """Note seconds and attempts of a stage in the run folder, for the report, and log what it says."""
    started = time.monotonic()
    with logged():
        yield
    note(run, name, seconds=time.monotonic() - started)


def note(run: str, name: str, *, seconds: float) -> None:
    """Write down how long a stage took, and which attempt this was."""
    values = {"name": name, "seconds": seconds, "attempts": task_run.run_count or 1}
    open_run(run).write(f"stages/{name}.json", values)


def begun(run: str, *, trains: bool, seconds: float) -> None:
    """Say that a run begins, which `prepare` took so many seconds to find out."""
    telling.begin(Path(run), stage_names(run, trains=trains), of=str(flow_run.id or ""))
    telling.done(Path(run), "prepare", seconds=seconds)
    # whoever started the flow run finds the folder by this
    create_link_artifact(Path(run).as_uri(), key="soppu-run", link_text=Path(run).name)


@contextmanager
def ending(run: str, *, own: bool = True) -> Iterator[None]:
    """Say how a run ends when the block does; nothing, where the run is not the flow's `own`."""
    with telling.ending(Path(run)) if own else nullcontext():
        yield


@contextmanager
def joining(run: str, user: str, *, target: str) -> Iterator[None]:
    """Say that a run's folder has a user join now, and how that ends; whoever watches it sees no more."""
    create_link_artifact(Path(run).resolve().as_uri(), key="soppu-run", link_text=Path(run).resolve().name)
    with join.as_run(run, Newcomer(user, "", target=target), of=str(flow_run.id or "")):
        yield


class _ToPrefect(logging.Handler):
    """Hands what one thread logs to Prefect: other targets are published to at the same time."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._logger, self._thread = get_run_logger(), threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._logger.log(record.levelno, record.getMessage())


@contextmanager
def logged() -> Iterator[None]:
    """What a stage says of its progress, and warnings of ours, are lines of Prefect's log of this task."""
    handler, ours = _ToPrefect(), logging.getLogger("soppu")
    logging.getLogger("soppu.progress").setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


class Progress:
    """A Prefect progress artifact that follows `{"note", "share"}` messages, at most one in `every_s`.

    What cannot be shown is logged; it ends no work.
    """

    def __init__(self, key: str, *, every_s: float = 10.0) -> None:
        # sync in a sync task; the annotation also covers the coroutine of an async one
        self._id = cast(UUID, create_progress_artifact(0.0, key=key, description="starting"))
        self._every_s = every_s
        self._last = 0.0

    def __call__(self, said: dict[str, Any]) -> None:
        """Show one message; the last one is always shown."""
        now, share = time.monotonic(), float(said["share"])
        if now - self._last >= self._every_s or share >= 1.0:
            self._last = now
            try:
                update_progress_artifact(self._id, progress=100.0 * share, description=str(said["note"]))
            except Exception as error:  # a server that is away raises half a dozen kinds
                _log.warning("progress is not shown: %s", error)
