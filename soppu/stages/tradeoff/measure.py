"""The generating of every arm in a process of its own; an arm that was done is read, not done again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import soppu
from soppu.devices import torch_device
from soppu.errors import SoppuError
from soppu.evaluate.report import describe_hardware
from soppu.progress.telling import Tell
from soppu.stages.run import Run
from soppu.stages.tradeoff.arms import FOLDER, Arm, digest
from soppu.stages.tradeoff.job import DTYPE, Done, Job

Process = Callable[[Job, Path, Done], dict[str, Any]]


def generated(run: Run, arm: Arm, job: Job, *, tell: Tell, process: Process) -> dict[str, Any]:
    """What `generate` found for an arm, kept in the run folder under all it follows from, and where.

    Raises:
        SoppuError: the process could not do it; the message is its own.
    """
    follows = [arm.what, job.asks, job.new_tokens, job.batch, job.timed, job.timed_tokens, job.stop, job.seed]
    made_of = digest([*follows, job.threads, DTYPE, run.base().hash, soppu.__version__, *_where(run)])
    name = f"{FOLDER}/texts-{made_of}.json"
    found = run.read(name)
    if not found:
        path = run.folder / FOLDER / f"job-{made_of}.json"
        found = process(job, path, _told(arm.name, tell))
        run.write(name, {"arm": arm.name, **found})
    return found


def _where(run: Run) -> tuple[str, ...]:
    """What seconds and bytes depend on beside the job: a run folder may have been carried elsewhere."""
    device = str(torch_device(run.config.gate.device, key="gate.device"))
    return describe_hardware(), device, torch.__version__, transformers.__version__


def apart(job: Job, path: Path, done: Done) -> dict[str, Any]:
    """In a process of its own, which is ended when this one gives up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(job)))
    out, log = path.with_suffix(".out.json"), path.with_suffix(".log")
    try:
        error, code = _worked(path, log, done)
        if code:
            raise SoppuError(f"arm {job.arm['name']!r}: {error or _end(log, code)}")
        return dict(json.loads(out.read_text()))
    finally:
        for file in (path, out, log):
            file.unlink(missing_ok=True)


def _worked(path: Path, log: Path, done: Done) -> tuple[str, int]:
    """Run the process to its end; what it said was wrong, and its exit code."""
    search = [str(Path(soppu.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-m", "soppu.stages.tradeoff.generate", str(path)]
    error = ""
    with log.open("wb") as said:
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said)
    try:
        for line in worker.stdout or ():
            told = json.loads(line)
            error = told.get("error", error)
            if "done" in told:
                done(told["done"], told["of"])
    except BaseException:  # an interrupt, too
        worker.kill()
        raise
    finally:
        code = worker.wait()
    return error, code


def _end(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"its process ended with {code}: {lines[-1] if lines else 'it said nothing'}"


def _told(name: str, tell: Tell) -> Done:
    return lambda number, total: tell({"note": f"text of {name}", "share": number / total})
