"""How the next token is chosen from one row of logits. Not for batching, which is `engine.batch`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request, already validated.

    Attributes:
        do_sample: False takes the likeliest token (after the repetition penalty).
        temperature: > 0, divides the logits.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p, 0 < p <= 1.
        repetition_penalty: > 0; 1 is off. Prompt and generated tokens count (arXiv:1909.05858).
        seed: None draws one.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


class Sampler:
    """Chooses the tokens of one request, with a generator of its own: companions do not change its draws."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed: int | None = None
        self._generator = torch.Generator()
        if sampling.do_sample:
            self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator.manual_seed(self.seed)

    @property
    def is_plain(self) -> bool:
        """True where the choice is the plain argmax, which a batch takes for all such rows at once."""
        return not self.sampling.do_sample and self.sampling.repetition_penalty == 1.0

    def choose(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token id.

        Args:
            logits: (vocabulary,) fp32, on the CPU.
            ids: prompt and generated tokens so far.
        """
        scores = penalise(logits, ids, penalty=self.sampling.repetition_penalty)
        if not self.sampling.do_sample:
            return int(scores.argmax())
        scores = warp(scores, self.sampling)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def penalise(logits: Tensor, ids: Sequence[int], *, penalty: float) -> Tensor:
    """Divide positive, multiply negative logits of the tokens in `ids` by `penalty`. Shape stays (v,)."""
    if penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(ids)))
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old < 0, old * penalty, old / penalty))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p; what is cut off becomes -inf. Shape stays (v,). O(v log v)."""
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort()
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        cut[-1] = False  # the likeliest token always stays
        scores = scores.index_fill(0, order[cut], -torch.inf)
    return scores
