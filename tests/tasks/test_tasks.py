"""What every task promises: retries, a time limit, a cache key that follows the content."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import Task
from prefect.states import Failed

from soppu.errors import ConfigError, FederationError, GateError, SoppuError, TargetError
from tasks.recording import stage_key, transient

FOLDER = Path(__file__).resolve().parents[2] / "tasks"


def all_tasks() -> list[Task[..., Any]]:
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        module = importlib.import_module(f"tasks.{path.stem}")
        found += [item for item in vars(module).values() if isinstance(item, Task)]
    return found


def test_there_is_a_task_for_every_stage() -> None:
    names = {task.name for task in all_tasks()}
    assert names == {
        "prepare",
        "federate",
        "collect",
        "freeze-current",
        "compress",
        "evaluate",
        "publish",
        "report",
    }


@pytest.mark.parametrize("task", all_tasks(), ids=lambda task: task.name)
def test_every_task_retries_within_a_time_limit_and_says_what_it_does(task: Task[..., Any]) -> None:
    assert task.retries >= 2
    assert task.timeout_seconds and task.timeout_seconds > 0
    assert task.fn.__doc__
    assert task.retry_condition_fn is transient


@pytest.mark.parametrize("name", ["federate", "compress", "evaluate"])
def test_expensive_stages_are_cached_by_their_inputs(name: str) -> None:
    task = next(task for task in all_tasks() if task.name == name)
    assert task.persist_result is True
    assert task.cache_key_fn is stage_key


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (FederationError("killed"), True),
        (TargetError("connection refused"), True),
        (OSError("disk"), True),
        (GateError(["too much lost"]), False),
        (ConfigError("unknown key"), False),
    ],
)
def test_only_what_another_attempt_could_mend_is_retried(error: Exception, again: bool) -> None:
    assert transient(None, None, Failed(data=error, message=str(error))) is again  # type: ignore[arg-type]


def test_every_error_of_ours_has_been_thought_about() -> None:
    """A new error class has to be put on one side or the other."""
    from tasks.recording import _HOPELESS

    retried = {"FederationError", "TargetError", "StorageError", "RegistryError", "ModelError", "PortTaken"}
    never_in_a_task = {"RequestError", "ReportError"}
    hopeless = {item.__name__ for item in _HOPELESS}
    known = {item.__name__ for item in _subclasses(SoppuError)}
    assert known == retried | never_in_a_task | hopeless


def test_the_cache_key_follows_run_registry_and_inputs(tiny_base: Path, tmp_path: Path) -> None:
    from soppu.stages.run import prepare

    config = tmp_path / "c.toml"
    config.write_text(
        f'runs = "{tmp_path}/runs"\n[base]\nmodel = "{tiny_base}"\n[registry]\nroot = "{tmp_path}/registry"\n'
    )
    run = prepare(str(config), text=False)
    context: Any = SimpleNamespace(task=SimpleNamespace(name="compress"))
    key = stage_key(context, {"run": run, "set_id": "s-1"})
    assert stage_key(context, {"run": run, "set_id": "s-1"}) == key
    assert stage_key(context, {"run": run, "set_id": "s-2"}) != key
    other: Any = SimpleNamespace(task=SimpleNamespace(name="evaluate"))
    assert stage_key(other, {"run": run, "set_id": "s-1"}) != key
    (tmp_path / "registry").rename(tmp_path / "gone")
    assert stage_key(context, {"run": run, "set_id": "s-1"}) != key


def _subclasses(cls: type[Exception]) -> set[type[Exception]]:
    return {item for sub in cls.__subclasses__() for item in {sub, *_subclasses(sub)}}
