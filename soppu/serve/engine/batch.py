"""Batch: the running rows. A row joins or leaves at any step; in between all decode together.

Queueing and threads: `soppu.serve.engine.engine`; the model: `soppu.serve.decoders.decoder`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.errors import RequestError
from soppu.serve.decoders.decoder import Decoder
from soppu.serve.decoders.kv_cache import Step
from soppu.serve.engine.generation import Choice, Generation
from soppu.serve.layers.routing import Routing
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Row:
    """A request, the `number`-th to arrive, and its place in the cache, which holds `held` of its ids."""

    generation: Generation
    place: int
    number: int
    held: int = 0

    @property
    def wants_prompt(self) -> bool:
        """True where the request wants to be told of its prompt's tokens."""
        return self.generation.job.request.prefill_details

    @property
    def missing(self) -> int:
        """Ids not yet in the cache; 1 where the prompt is read and only the next token is needed."""
        return len(self.generation.ids) - self.held


class Batch:
    """The running rows of one decoder, at most as many as its cache has. One thread calls `join` and `step`.

    A step reads at most `prefill` prompt tokens, which bounds how long decoding rows wait.
    """

    def __init__(self, decoder: Decoder, *, prefill: int, device: torch.device) -> None:
        self.failures = 0  # forwards that have failed in a row
        self._decoder = decoder
        self._prefill = prefill
        self._device = device
        self._joined = 0
        self._rows: list[_Row] = []  # by place
        self._routed: tuple[list[_Row], Routing] = ([], Routing([]))

    def __len__(self) -> int:
        """Rows under way."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """Rows that may join now."""
        return self._decoder.cache.rows - len(self._rows)

    def join(self, generation: Generation) -> None:
        """Give a request the first free place; it takes part from the next step on."""
        place = min(set(range(self._decoder.cache.rows)).difference(row.place for row in self._rows))
        self._joined += 1
        self._rows.append(_Row(generation, place, self._joined))
        self._rows.sort(key=lambda row: row.place)

    def step(self) -> None:
        """Read some prompt tokens of new rows, then decode one token for every row whose prompt is read.

        Rows that are finished or cancelled leave. A forward that fails ends only its own rows.
        """
        self.leave()
        if reading := self._next_to_read():
            self._forward(reading, self._read)
            self.leave()
        if decoding := [row for row in self._rows if row.missing == 1 and row.held]:
            self._forward(decoding, self._decode)
            self.leave()

    def leave(self) -> None:
        """Remove the rows that are finished or cancelled; their places are free at once."""
        for row in self._rows:
            # its prompt is half read: whether its numbers are finite is not known yet
            if row.generation.done and row.held and row.missing > 1:
                self._decoder.cache.clear(row.place)
        self._rows = [row for row in self._rows if not row.generation.done]
        if not self._rows:
            self._routed = ([], Routing([]))  # which holds the tensors of a bundle version

    def fail(self, error: RequestError) -> None:
        """End all rows."""
        for row in self._rows:
            row.generation.fail(error)
        self.leave()

    def _next_to_read(self) -> list[_Row]:
        """The rows whose prompts are read next: the longest-waiting, and those that fit beside it, padded."""
        unread = [row for row in self._rows if row.missing > 1 or not row.held]
        unread.sort(key=lambda row: (not row.held, row.number))
        if not unread or unread[0].held or unread[0].missing > self._prefill:
            return unread[:1]
        chosen: list[_Row] = []
        for row in unread:
            width = max(other.missing for other in [*chosen, row])
            if width * (len(chosen) + 1) > self._prefill:
                break
            chosen.append(row)
        return sorted(chosen, key=lambda row: row.place)

    def _read(self, rows: list[_Row]) -> None:
        counts = [min(row.missing, self._prefill) for row in rows]
        ids = [
            row.generation.ids[row.held : row.held + count] for row, count in zip(rows, counts, strict=True)
        ]
        width = max(counts)
        padded = [own + own[-1:] * (width - len(own)) for own in ids]
        step = self._step(rows, padded, counts)
        if any(row.wants_prompt for row in rows):
            logits = self._read_aloud(rows, replace(step, every=True))
        else:
            logits = self._logits(rows, step, self._route(rows))
        finished = [position for position, row in enumerate(rows) if row.missing == 0]
        self._push([rows[position] for position in finished], logits[finished])

    def _read_aloud(self, rows: list[_Row], step: Step) -> Tensor:
        """As `_logits`, and tells rows that want it how likely each token of their prompts was."""
        every = self._logits(rows, step, self._route(rows)).view(*step.ids.shape, -1)
        for row, start, count, logits in zip(rows, step.starts, step.counts, every, strict=True):
            if row.wants_prompt:
                following = row.generation.job.prompt[start + 1 : start + count + 1]
                row.generation.read += _logprobs(following, logits)
        return every[range(len(rows)), [count - 1 for count in step.counts]]

    def _decode(self, rows: list[_Row]) -> None:
        if self._routed[0] != rows:
            self._routed = rows, self._route(rows)
        step = self._step(rows, [row.generation.ids[-1:] for row in rows], [1] * len(rows))
        self._push(rows, self._logits(rows, step, self._routed[1]))

    def _step(self, rows: list[_Row], ids: list[list[int]], counts: list[int]) -> Step:
        tokens = torch.tensor(ids, dtype=torch.long, device=self._device)
        return Step(tokens, [row.place for row in rows], [row.held for row in rows], counts)

    def _logits(self, rows: list[_Row], step: Step, routing: Routing) -> Tensor:
        logits = self._decoder.forward(step, routing)
        for row, count in zip(rows, step.counts, strict=True):
            row.held += count
        return logits

    def _push(self, rows: list[_Row], logits: Tensor) -> None:
        if not rows:
            return
        choices = choose([row.generation for row in rows], logits)
        for row, choice in zip(rows, choices, strict=True):
            if not math.isfinite(choice.logprob):
                row.generation.fail(_not_finite(row.generation))
                self._decoder.cache.clear(row.place)
            elif not row.generation.done:  # cancelled during the forward, or failed at its choice
                row.generation.push(choice)

    def _forward(self, rows: list[_Row], work: Callable[[list[_Row]], None]) -> None:
        try:
            work(rows)
            self.failures = 0
        except Exception as error:  # of any kind: it ends this forward's requests, not the thread
            self.failures += 1
            _LOG.exception("a step of %d requests failed", len(rows))
            for row in rows:
                row.generation.fail(failed(f"{type(error).__name__}: {error}"))
                self._decoder.cache.clear(row.place)

    def _route(self, rows: list[_Row]) -> Routing:
        return Routing([row.generation.job.resolved.where for row in rows])


@torch.inference_mode()
def choose(rows: Sequence[Generation], logits: Tensor) -> list[Choice]:
    """The next token of every row of `logits` (b, v); a row without a valid choice fails alone."""
    chosen = logits.argmax(-1)
    total = logits.logsumexp(-1)
    finite = total.isfinite().tolist()  # a single -inf only rules a token out
    for position, row in enumerate(rows):
        if not finite[position]:
            row.fail(_not_finite(row))
        elif not row.sampler.is_plain:
            try:
                chosen[position] = row.sampler.choose(logits[position].cpu(), row.ids)
            except RuntimeError as error:  # torch.multinomial, where the parameters overflow the scores
                row.fail(failed(f"no token can be chosen with these parameters: {error}"))
    logprobs = (logits.gather(1, chosen[:, None])[:, 0] - total).tolist()
    likeliest = [
        _likeliest(logits[n], total[n], row.job.request.alternatives) if row.job.request.alternatives else ()
        for n, row in enumerate(rows)
    ]
    return list(map(Choice, chosen.tolist(), logprobs, likeliest))


def _likeliest(logits: Tensor, total: Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens (id, logprob) of one row, the likeliest first."""
    top = logits.topk(min(count, len(logits)))
    pairs = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
    return [(token_id, logprob) for token_id, logprob in pairs if math.isfinite(logprob)]


@torch.inference_mode()
def _logprobs(following: Sequence[int], logits: Tensor) -> list[float | None]:
    """How likely each token was after what came before it; `logits` (T, v) may be of more places."""
    logits = logits[: len(following)]
    targets = torch.tensor(following, dtype=torch.long, device=logits.device)
    logprobs = (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
    return [logprob if math.isfinite(logprob) else None for logprob in logprobs]


def _not_finite(row: Generation) -> RequestError:
    return failed(f"the logits of adapter {row.job.resolved.adapter_id!r} are not finite")
