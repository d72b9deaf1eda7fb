"""How the next token is chosen from one row of logits. Not for batching, which is `engine.batch`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request, already validated."""

    do_sample: bool = False  # False takes the likeliest token (after the repetition penalty)
    temperature: float = 1.0  # > 0, divides the logits
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches p, 0 < p <= 1
    repetition_penalty: float = 1.0  # > 0; 1 is off. Prompt and generated tokens count (arXiv:1909.05858)
    seed: int | None = None  # None draws one


class Sampler:
    """Chooses the tokens of one request, with its own generator: other rows do not change its draws."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed: int | None = None
        self._process = processors(sampling)
        self._generator = torch.Generator()
        if sampling.do_sample:
            self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator.manual_seed(self.seed)

    @property
    def is_plain(self) -> bool:
        """True where the choice is the plain argmax, which a batch takes for all such rows at once."""
        return not self.sampling.do_sample and self.sampling.repetition_penalty == 1.0

    def choose(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token id for `logits` (v,), fp32 on the CPU, after the tokens `ids`. O(v log v)."""
        scores: Tensor = self._process(torch.LongTensor([ids]), logits[None])[0]
        if not self.sampling.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def processors(sampling: Sampling) -> LogitsProcessorList:
    """What changes the scores (b, v) before a token is chosen, in LoRAX's order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.do_sample:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
    return chain
