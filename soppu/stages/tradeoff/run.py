"""The comparison of a run's arms, from its frozen set to tradeoff.json. What was measured once is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from soppu import files, models
from soppu.data import UserData
from soppu.errors import ConfigError, DataError
from soppu.evaluate.losses import ExampleLosses
from soppu.evaluate.tradeoff.figures import Measured
from soppu.evaluate.tradeoff.texts import CODE_ONLY, TEXT_METRICS, Said, missing
from soppu.progress.telling import Tell
from soppu.stages.bench import with_text
from soppu.stages.run import Run, open_run
from soppu.stages.tradeoff import arms as arms_of
from soppu.stages.tradeoff import prompts, solve
from soppu.stages.tradeoff.arms import Arm, Arms
from soppu.stages.tradeoff.job import Job
from soppu.stages.tradeoff.losses import Losses
from soppu.stages.tradeoff.measure import Process, apart, generated
from soppu.stages.tradeoff.prompts import Ask
from soppu.stages.tradeoff.write import Asked, Found, write
from soppu.tradeoff_settings import METRICS, USUAL, EvaluateConfig

TIMED = 2  # prompts of a user that are also asked alone, for their latency
TIMED_TOKENS = 16  # new ones in each of those answers


def silence(said: Mapping[str, Any]) -> None:
    """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How a comparison goes about it.

    Attributes:
        tell: hears how far it is.
        process: where text is generated, see `soppu.stages.tradeoff.measure`.
    """

    tell: Tell = silence
    process: Process = apart


def compare(
    run_folder: str,
    set_id: str = "",
    *,
    options: EvaluateConfig | None = None,
    how: Measuring | None = None,
) -> Path:
    """Measure every arm of `options`, by default the run's own settings; returns the comparison's path.

    What an earlier call measured of an arm is not measured again, an equal comparison is not written anew. A
    second call at the same time waits for the first.

    Args:
        set_id: the frozen set that is compressed; by default that of the run's newest evaluation.

    Raises:
        ConfigError: an arm or a metric that there is not; no evaluation, and no set named.
        DataError: no user's text is at hand.
        MissingExtra: a metric was asked for by name, and its library is not installed.
        SoppuError: an arm's text could not be generated, or its programs not be kept apart.
    """
    run, how = open_run(str(Path(run_folder).resolve())), how or Measuring()  # latest is a link
    options = options or run.config.evaluate
    set_id = set_id or newest_set(run)
    with files.exclusive(run.folder / arms_of.FOLDER / "lock"):
        opened = Arms(run, set_id, tell=how.tell)
        chosen = opened.open(options.arms or default_arms(run))
        texts = with_text(run.config, opened.own)
        if not texts:
            raise DataError(f"{run.id}: no user's text is at hand, so nothing can be measured here")
        asked = _asked(run, texts, options)
        losses = Losses(run, chosen, texts, tell=how.tell).measure()
        measured = [_of_arm(run, arm, (asked, losses), how) for arm in chosen]
        return write(run, asked, Found(measured, losses, texts, [arm.what for arm in chosen]))


def newest_set(run: Run) -> str:
    """The set of the run's newest evaluation. ConfigError where there is none."""
    name = run.newest_evaluation()
    if not name:
        raise ConfigError(f"{run.folder}: holds no evaluation, so no set to compare; run the pipeline first")
    return str(run.read(name)["set_id"])


def default_arms(run: Run) -> tuple[str, ...]:
    """Everything that a run has, and its own compression where that has a ratio."""
    own = run.config.compress
    return (*arms_of.known(run), *([f"{own.method}@{own.ratio:g}"] if own.ratio else []))


def _asked(run: Run, texts: Mapping[str, UserData], options: EvaluateConfig) -> Asked:
    tokenizer = models.load_tokenizer(run.base())
    asks = [
        ask
        for text in texts.values()
        for ask in prompts.choose(
            text, tokenizer, run.config.data, prompts=options.prompts, new_tokens=options.max_new_tokens
        )
    ]
    functions = prompts.of_functions(list(texts.values()), prompts=options.prompts)
    reasons = {metric: _why_not(metric, options.metrics, functions=functions) for metric in METRICS}
    return Asked(
        asks,
        [metric for metric, why in reasons.items() if not why],
        {metric: why for metric, why in reasons.items() if why},
        options.prompts,
        _job(run, asks, options, functions=functions),
        None if reasons["pass_at_1"] else solve.asked(run, list(texts), options),
    )


def _why_not(metric: str, wanted: Sequence[str], *, functions: bool) -> str:
    if metric not in (wanted or USUAL):
        return "not asked for"
    if metric in CODE_ONLY and not functions:
        return "the examples are not Python functions, a prompt the head and a completion the body"
    why = missing(metric)
    if why and wanted:
        raise why
    return str(why) if why else ""


def _job(run: Run, asks: Iterable[Ask], options: EvaluateConfig, *, functions: bool) -> Job:
    return Job(
        run=str(run.folder.resolve()),
        arm={},
        asks=[dataclasses.asdict(ask) for ask in asks],
        new_tokens=options.max_new_tokens,
        batch=options.batch,
        timed=TIMED,
        timed_tokens=min(TIMED_TOKENS, options.max_new_tokens),
        stop=prompts.STOP if functions else (),
        threads=torch.get_num_threads(),
        seed=run.config.seed,
    )


def _of_arm(run: Run, arm: Arm, what: tuple[Asked, Mapping[str, ExampleLosses]], how: Measuring) -> Measured:
    """An arm's text and its costs; only its bytes where no metric asks for text."""
    asked, losses = what
    found: dict[str, Any] = {}
    if any(metric in TEXT_METRICS for metric in asked.metrics):
        job = dataclasses.replace(asked.job, arm=dataclasses.asdict(arm))
        found = generated(run, arm, job, tell=how.tell, process=how.process)
    measured = _measured(arm, asked.asks, found, losses)
    if asked.problems:
        solved = solve.solved(run, arm, asked.problems, tell=how.tell, process=how.process)
        return dataclasses.replace(measured, solved=solved)
    return measured


def _measured(
    arm: Arm, asks: Sequence[Ask], found: Mapping[str, Any], losses: Mapping[str, ExampleLosses]
) -> Measured:
    errors = [arm.relative_error[user] for user in losses if user in arm.relative_error]
    about = {
        "name": arm.name,
        "kind": arm.kind,
        "method": arm.method,
        "target": arm.target,
        "bundle_id": arm.bundle_id or None,
        "bytes": arm.size,
        "bytes_per_user": arm.bytes_per_user,
        "relative_error": fmean(errors) if errors else None,
    }
    if not found:
        return Measured(about, sizes=arm.sizes)
    said: dict[str, list[Said]] = {}
    for ask, text in zip(asks, found["texts"], strict=True):
        said.setdefault(ask.user, []).append(Said(ask.prompt, ask.reference, text))
    times: dict[str, dict[str, list[float]]] = {"first": {}, "total": {}}
    for one in found["latency_ms"]:
        for name, by_user in times.items():
            by_user.setdefault(one["user"], []).append(one[name])
    return Measured(
        about,
        sizes=arm.sizes,
        said=said,
        latency_ms=times["total"],
        first_ms=times["first"],
        tokens_s=found["tokens_s"],
        memory_bytes=found["memory_bytes"],
    )
