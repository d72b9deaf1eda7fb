"""What every task promises: retries, a time limit, a cache key that follows the content."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from prefect import Task
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed

from soppu.errors import (
    ConfigError,
    FederationError,
    GateError,
    SoppuError,
    SuperLinkAway,
    TargetError,
)
from soppu.federation.simulation import free_port
from soppu.stages.run import READS, prepare
from tasks import outage
from tasks.recording import Progress, stage_key, transient

TRAINING = {"federate-cohort", "federate"}
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
        "federate-cohort",
        "basis",
        "federate",
        "collect",
        "freeze-current",
        "compress",
        "evaluate",
        "refit",
        "tradeoff",
        "publish",
        "report",
        "join",
        "collect-joins",
    }


@pytest.mark.parametrize("task", all_tasks(), ids=lambda task: task.name)
def test_every_task_retries_within_a_time_limit_and_says_what_it_does(task: Task[..., Any]) -> None:
    assert task.retries >= 2
    assert task.timeout_seconds and task.timeout_seconds > 0
    assert task.fn.__doc__
    assert task.retry_condition_fn is transient


@pytest.mark.parametrize("name", ["federate-cohort", "basis", "federate", "compress", "evaluate"])
def test_expensive_stages_are_cached_by_their_inputs(name: str) -> None:
    task = next(task for task in all_tasks() if task.name == name)
    assert task.persist_result is True
    assert task.cache_key_fn is stage_key


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (FederationError("killed"), True),
        (SuperLinkAway("nobody answers"), True),
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
    import soppu.gateway.refusals  # noqa: F401  the only ones that no task imports
    from tasks.recording import _HOPELESS

    retried = {"FederationError", "TargetError", "StorageError", "RegistryError", "ModelError", "PortTaken"}
    retried |= {"SuperLinkAway"}
    never_in_a_task = {"RequestError", "ReportError", "NotCompiled", "NotThere", "RouterError", "Refused"}
    hopeless = {item.__name__ for item in _HOPELESS}
    known = {item.__name__ for item in _subclasses(SoppuError)}
    assert known == retried | never_in_a_task | hopeless


def test_the_cache_key_follows_run_registry_and_inputs(tiny_base: Path, tmp_path: Path) -> None:
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


@pytest.fixture
def keyed(tiny_base: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`keyed()`: the key of every cached stage of one nightly's run, its text and base model below
    `tmp_path`.
    """
    shutil.copytree(tiny_base, tmp_path / "base")
    for name in ("users", "public"):
        (tmp_path / name).mkdir()
        line = {"user_id": "ann", "prompt": f"{name}?", "completion": "yes"}
        (tmp_path / name / "ann.jsonl").write_text(json.dumps(line))
    config = tmp_path / "nightly.toml"
    config.write_text(
        f'runs = "{tmp_path}/runs"\n[base]\nmodel = "{tmp_path}/base"\n'
        f'[registry]\nroot = "{tmp_path}/registry"\n'
        f'[data]\nsource = "{tmp_path}/users"\n[align]\nsource = "{tmp_path}/public"\n'
    )

    def keys(**overrides: Any) -> dict[str, str]:
        given = {name.replace("__", "."): value for name, value in overrides.items()}
        run = prepare(str(config), given, text=False)
        cached = [task for task in all_tasks() if task.cache_key_fn is not None]
        return {
            task.name: stage_key(cast(Any, SimpleNamespace(task=task)), {"run": run, "set_id": "s-1"})
            for task in cached
        }

    return keys


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name, key in before.items() if key != after[name]}


def test_a_nightly_of_the_same_everything_finds_what_the_last_one_left(keyed: Callable[..., Any]) -> None:
    assert keyed() == keyed()
    assert keyed().keys() == {"federate-cohort", "basis", "federate", "compress", "evaluate"} == READS.keys()


def test_a_verdict_is_judged_again_when_the_users_text_has_changed(
    keyed: Callable[..., Any], tmp_path: Path
) -> None:
    before = keyed()
    text = (tmp_path / "users" / "ann.jsonl").read_text()
    (tmp_path / "users" / "ann.jsonl").write_text(text.replace("yes", "no!"))
    assert changed(before, keyed()) == {*TRAINING, "evaluate"}
    (tmp_path / "users" / "ann.jsonl").write_text(text)
    assert keyed() == before
    (tmp_path / "users" / "bob.jsonl").write_text(text.replace("ann", "bob"))
    assert changed(before, keyed()) == {*TRAINING, "evaluate"}


def test_a_bundle_weighed_by_public_text_follows_that_text(keyed: Callable[..., Any], tmp_path: Path) -> None:
    plain, weighed = keyed(), keyed(compress__whiten=True)
    (tmp_path / "public" / "ann.jsonl").write_text(
        json.dumps({"user_id": "p", "prompt": "other", "completion": "text"})
    )
    assert changed(plain, keyed()) == TRAINING
    assert changed(weighed, keyed(compress__whiten=True)) == {*TRAINING, "basis", "compress"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_everything_follows_the_base_model_and_its_tokenizer(
    keyed: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    before = keyed()
    path = tmp_path / "base" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == "model.safetensors" else data + b"\n")
    if name == "config.json":
        path.write_text(json.dumps({**json.loads(data), "rms_norm_eps": 0.5}))
    assert changed(before, keyed()) == set(before)


@pytest.mark.parametrize(
    "setting", [{"gate__max_relative_error": 0.3}, {"compress__ratio": 4.0}, {"data__heldout_examples": 2}]
)
def test_everything_follows_the_settings(keyed: Callable[..., Any], setting: dict[str, Any]) -> None:
    assert changed(keyed(), keyed(**setting)) == set(READS)


def test_settings_changed_in_the_run_folder_itself_count_too(
    keyed: Callable[..., Any], tmp_path: Path
) -> None:
    before = keyed()
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name.startswith("nightly-"))
    frozen = (folder / "config.toml").read_text()
    loose = frozen.replace("max_relative_error = 0.7", "max_relative_error = 0.9")
    assert loose != frozen
    (folder / "config.toml").write_text(loose)
    context: Any = SimpleNamespace(task=SimpleNamespace(name="evaluate"))
    assert stage_key(context, {"run": str(folder), "set_id": "s-1"}) != before["evaluate"]


def _subclasses(cls: type[Exception]) -> set[type[Exception]]:
    return {item for sub in cls.__subclasses__() for item in {sub, *_subclasses(sub)}}


def test_a_subflow_that_cannot_be_made_is_called_again_and_one_that_fails_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage, "_PAUSES_S", (0.0,) * 3)
    errors: list[Exception] = [httpx.ConnectError("away"), httpx.ConnectError("away")]

    def subflow(value: int) -> int:
        if errors:
            raise errors.pop(0)
        return value

    assert outage.outlasting(subflow, value=7) == 7
    errors += [httpx.ConnectError("away")] * 4
    with pytest.raises(httpx.ConnectError):
        outage.outlasting(subflow, value=7)
    assert not errors
    for own in (GateError(["worse"]), httpx.ReadTimeout("slow"), ConnectionError("a target's")):
        errors.append(own)
        with pytest.raises(type(own)):
            outage.outlasting(subflow, value=7)


def test_progress_that_cannot_be_shown_ends_no_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody listens at the API's address."""
    progress = object.__new__(Progress)
    progress._id, progress._every_s, progress._last = uuid4(), 0.0, 0.0
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        progress({"note": "round 2", "share": 0.5})
    assert "progress is not shown" in caplog.text
