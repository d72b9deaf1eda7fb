"""A comparison on the disk: tradeoff-<key>.json, its texts beside it, and tradeoff.json, which is the newest.

The key is of all that a comparison follows from. An equal one stays as it was first written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

import soppu
from soppu import files, models
from soppu.data import UserData
from soppu.devices import torch_device
from soppu.evaluate.losses import ExampleLosses
from soppu.evaluate.report import describe_hardware, utc_now
from soppu.evaluate.tradeoff import figures, schema
from soppu.evaluate.tradeoff.figures import Measured
from soppu.evaluate.tradeoff.texts import NEEDS
from soppu.stages.run import Run
from soppu.stages.tradeoff.job import DTYPE, Job
from soppu.stages.tradeoff.prompts import Ask


@dataclass(frozen=True)
class Asked:
    """What was asked of every arm, and how."""

    asks: Sequence[Ask]
    metrics: Sequence[str]
    left_out: Mapping[str, str]  # metric -> why it is not among them
    prompts: int  # a user, at most
    job: Job
    problems: Job | None = None  # HumanEval's, where they are asked


@dataclass(frozen=True)
class Found:
    """What was measured."""

    arms: Sequence[Measured]
    losses: Mapping[str, ExampleLosses]
    texts: Mapping[str, UserData]
    whats: Sequence[str]  # of the arms, in order: what each is


def write(run: Run, asked: Asked, found: Found) -> Path:
    """Write a comparison unless it is there, and point tradeoff.json at it; returns its path."""
    environment = _environment(run, asked.job)
    key = _key(run, asked, found, environment)
    path = run.folder / f"tradeoff-{key}.json"
    if not path.exists():
        texts = f"tradeoff-texts-{key}.jsonl"
        values = {
            "format": 1,
            "run": run.id,
            "created": utc_now(),
            "soppu": soppu.__version__,
            "environment": environment,
            "generation": _generation(asked),
            **_figures(asked, found, seed=run.config.seed),
            "texts": texts,
        }
        schema.check(values, source=path.name)
        files.write_text(
            run.folder / texts, "".join(json.dumps(line) + "\n" for line in _lines(asked, found))
        )
        run.write(path.name, values)
    files.point(run.folder / schema.FILE, path.name)
    return path


def _key(run: Run, asked: Asked, found: Found, environment: Mapping[str, Any]) -> str:
    names = [arm.name for arm in found.arms]
    texts = {user: text.digest() for user, text in found.texts.items()}
    how = [dataclasses.asdict(asked.job), list(asked.metrics), dict(asked.left_out), environment]
    how += [dataclasses.asdict(asked.problems)] if asked.problems else []
    follows = json.dumps([run.id, soppu.__version__, names, list(found.whats), texts, how], sort_keys=True)
    return hashlib.sha256(follows.encode()).hexdigest()[:12]


def _generation(asked: Asked) -> dict[str, Any]:
    job = asked.job
    return {
        "greedy": True,
        "max_new_tokens": job.new_tokens,
        "batch": job.batch,
        "stop": list(job.stop),
        "seed": job.seed,
        "prompts_per_user": asked.prompts,
        "timed_prompts": job.timed,
        "timed_tokens": job.timed_tokens,
        "problems": len(asked.problems.asks) if asked.problems else 0,
    }


def _figures(asked: Asked, found: Found, *, seed: int) -> dict[str, Any]:
    scores = figures.scores(found.arms, found.losses, metrics=asked.metrics)
    nothing = figures.about_zero(scores)
    shown = {metric: arms for metric, arms in scores.items() if metric not in nothing}
    return {
        "arms": figures.arms_of(found.arms, shown, seed=seed),
        "left_out": {**asked.left_out, **nothing},
        "rows": figures.rows_of(found.arms, shown, found.losses, seed=seed),
    }


def _lines(asked: Asked, found: Found) -> Iterator[dict[str, Any]]:
    """A line a prompt. Its losses are there where each of the user's examples is one block of tokens."""
    places: dict[str, int] = {}
    for ask in asked.asks:
        place = places.get(ask.user, 0)
        places[ask.user] = place + 1
        each = found.losses[ask.user]
        single = len(each.tokens) == len(found.texts[ask.user].heldout) and each.tokens[ask.example] > 0
        yield {
            "user": ask.user,
            "prompt": ask.prompt,
            "reference": ask.reference,
            "texts": {arm.name: arm.said[ask.user][place].text for arm in found.arms if arm.said},
            "losses": {
                arm.name: each.sums[arm.name][ask.example] / each.tokens[ask.example]
                for arm in found.arms
                if single
            },
        }


def _environment(run: Run, job: Job) -> dict[str, Any]:
    base = run.base()
    return {
        "hardware": describe_hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "packages": {name: _version(name) for name in ("numpy", *dict.fromkeys(NEEDS.values()))},
        "device": str(torch_device(run.config.gate.device, key="gate.device")),
        "dtype": f"losses {models.dtype_name(run.config.frozen_dtype)}, text {DTYPE}",
        "threads": job.threads,
        "seed": job.seed,
        "base_model": base.name,
        "base_hash": base.hash,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
