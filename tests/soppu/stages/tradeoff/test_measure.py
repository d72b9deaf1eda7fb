"""Generating in a process of its own: what it tells, how its end is told, and what is left of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soppu.errors import SoppuError
from soppu.stages.run import Run
from soppu.stages.tradeoff import generate, measure
from soppu.stages.tradeoff.arms import Arm
from soppu.stages.tradeoff.job import Job
from soppu.stages.tradeoff.measure import apart, generated
from soppu.stages.tradeoff.run import silence

ARM = Arm("base", "base", "base")
ASK = {"user": "ann", "inputs": "say 1: ", "prompt": "say 1: ", "reference": "", "example": 0}


def job(run: str = "nowhere", **changed: object) -> Job:
    values = {
        "run": run,
        "arm": vars(ARM),
        "asks": [ASK],
        "new_tokens": 3,
        "batch": 2,
        "timed": 1,
        "timed_tokens": 2,
        "stop": (),
        "threads": 1,
        "seed": 0,
    }
    return Job(**(values | changed))  # type: ignore[arg-type]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_process_is_given_the_job_says_how_far_it_is_and_leaves_nothing(
    python: Callable[[str], None], tmp_path: Path
) -> None:
    python(
        'echo "{\\"done\\": 1, \\"of\\": 2}"; echo "{\\"done\\": 2, \\"of\\": 2}"\n'
        'cp "$3" "${3%.json}.out.json"'
    )
    told: list[tuple[int, int]] = []
    found = apart(job(), tmp_path / "jobs" / "job-1.json", lambda done, of: told.append((done, of)))
    assert found == json.loads(json.dumps(vars(job())))
    assert told == [(1, 2), (2, 2)] and files(tmp_path / "jobs") == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "{\\"error\\": \\"adapter a-1 is gone\\"}"; exit 1', "arm 'base': adapter a-1 is gone"),
        ("echo killed by hand >&2; exit 7", "its process ended with 7: killed by hand"),
        ("kill -9 $$", "its process ended with -9: it said nothing"),
    ],
)
def test_what_went_wrong_is_the_process_s_own_word(
    script: str, said: str, python: Callable[[str], None], tmp_path: Path
) -> None:
    python(script)
    with pytest.raises(SoppuError, match=said):
        apart(job(), tmp_path / "jobs" / "job-1.json", lambda done, of: None)
    assert files(tmp_path / "jobs") == []


def test_who_is_interrupted_ends_the_process(python: Callable[[str], None], tmp_path: Path) -> None:
    python(f'echo $$ > {tmp_path}/pid; echo "{{\\"done\\": 1, \\"of\\": 2}}"; exec sleep 60')

    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(job(), tmp_path / "jobs" / "job-1.json", interrupt)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert files(tmp_path / "jobs") == []


def test_equal_jobs_of_equal_arms_are_generated_once_on_a_machine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Job] = []

    def process(job: Job, path: Path, done: Callable[[int, int], None]) -> dict[str, object]:
        asked.append(job)
        return {"texts": [str(len(asked))]}

    first = generated(run, ARM, job(), tell=silence, process=process)
    assert generated(run, ARM, job(), tell=silence, process=process)["texts"] == first["texts"]
    for other in ({"new_tokens": 4}, {"seed": 1}, {"stop": ("\n",)}, {"batch": 3}):
        assert generated(run, ARM, job(**other), tell=silence, process=process)["texts"] != first["texts"]
    assert len(asked) == 5
    # carried to another machine, whose seconds are others
    monkeypatch.setattr(measure, "describe_hardware", lambda: "another machine")
    assert generated(run, ARM, job(), tell=silence, process=process)["texts"] == ["6"]


def test_the_process_itself_tells_each_answer_and_writes_what_was_found(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's own `main`, with the server's engine and the tiny model, in this process."""
    path = tmp_path / "job-1.json"
    monkeypatch.setattr(sys, "argv", ["generate", str(path)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # main gives them other meanings
    path.write_text(json.dumps(vars(job(str(run.folder), asks=[ASK, {**ASK, "user": "bob"}]))))
    assert generate.main() == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"done": done, "of": 4} for done in range(1, 5)]  # each alone, then together
    found = json.loads(path.with_suffix(".out.json").read_text())
    assert len(found["texts"]) == 2 and found["texts"][0] == found["texts"][1]  # greedy, one model
    assert [one["user"] for one in found["latency_ms"]] == ["ann", "bob"]
    assert all(0 < one["first"] <= one["total"] for one in found["latency_ms"])
    assert found["tokens_s"] > 0 and found["memory_bytes"] > 1 << 20


def test_the_process_tells_what_is_wrong_with_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job-1.json"
    path.write_text(json.dumps(vars(job(str(tmp_path)))))
    monkeypatch.setattr(sys, "argv", ["generate", str(path)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert generate.main() == 1
    assert "not a run folder" in json.loads(capsys.readouterr().out)["error"]
