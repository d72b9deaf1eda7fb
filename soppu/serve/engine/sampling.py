"""How the next token is chosen from one row of logits. Not for batching, which is `engine.batch`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from soppu.serve.engine.grammar import Matcher


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request, already validated."""

    do_sample: bool = False  # False takes the likeliest token (after the penalties)
    temperature: float = 1.0  # > 0, divides the logits
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches p, 0 < p <= 1
    typical_p: float = 1.0  # keep the tokens nearest to the expected information up to p (arXiv:2202.00666)
    repetition_penalty: float = 1.0  # > 0; 1 is off. Prompt and generated tokens count (arXiv:1909.05858)
    frequency_penalty: float = 0.0  # taken off a score for each time the token was generated, as OpenAI does
    presence_penalty: float = 0.0  # taken off once where the token was generated at all
    seed: int | None = None  # None draws one


class Sampler:
    """Chooses the tokens of one request, with its own generator: other rows do not change its draws.

    `prompt` is how many of a text's tokens were not generated; `matcher` rules tokens out, and is advanced by
    whoever pushes the chosen token.
    """

    def __init__(self, sampling: Sampling, *, prompt: int = 0, matcher: Matcher | None = None) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.seed: int | None = None
        self._process = processors(sampling, prompt=prompt, matcher=matcher)
        self._generator = torch.Generator()
        if sampling.do_sample:
            self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator.manual_seed(self.seed)

    @property
    def is_plain(self) -> bool:
        """True where the choice is the plain argmax, which a batch takes for all such rows at once."""
        return not self.sampling.do_sample and not self._process

    def choose(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token id for `logits` (v,), fp32 on the CPU, after the tokens `ids`. O(v log v).

        Raises RuntimeError where the parameters leave no token, or the grammar has grown too costly.
        """
        scores: Tensor = self._process(torch.LongTensor([ids]), logits[None])[0]
        if not self.sampling.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def processors(sampling: Sampling, *, prompt: int = 0, matcher: Matcher | None = None) -> LogitsProcessorList:
    """What changes the scores (b, v) before a token is chosen, in LoRAX's order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.frequency_penalty or sampling.presence_penalty:
        chain.append(_CountPenalty(sampling, prompt=prompt))
    if matcher is not None:
        chain.append(_Grammar(matcher))
    if sampling.do_sample:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
        if sampling.typical_p < 1.0:
            chain.append(TypicalLogitsWarper(sampling.typical_p))
    return chain


class _CountPenalty(LogitsProcessor):
    """Frequency and presence penalty over the generated tokens; LoRAX's own divides by the text's length."""

    def __init__(self, sampling: Sampling, *, prompt: int) -> None:
        self._sampling = sampling
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated).to(scores))
        penalty = self._sampling.frequency_penalty * counts
        return scores - penalty - self._sampling.presence_penalty * (counts > 0)


class _Grammar(LogitsProcessor):
    """Leaves the tokens with which the text can still become what the grammar wants."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = self._matcher.allowed(scores.shape[-1])
        return scores.masked_fill(~allowed, -torch.inf)
