"""Batch: the running rows. A row joins or leaves at any step; in between all decode together.

Queueing and threads: `soppu.serve.engine.engine`; the model: `soppu.serve.decoders.decoder`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.errors import RequestError
from soppu.serve.decoders.decoder import Decoder
from soppu.serve.decoders.kv_cache import Step
from soppu.serve.engine.generation import Generation
from soppu.serve.layers.routing import Routing
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSize:
    """How much a batch does at once.

    Attributes:
        rows: requests under way.
        prefill: prompt tokens read in one step, which bounds how long decoding rows wait.
    """

    rows: int
    prefill: int


@dataclass(eq=False)
class _Row:
    """A request, the `number`-th to arrive, and its place in the cache, which holds `held` of its ids."""

    generation: Generation
    place: int
    number: int
    held: int = 0

    @property
    def missing(self) -> int:
        """Ids not yet in the cache; 1 where the prompt is read and only the next token is needed."""
        return len(self.generation.ids) - self.held

    @property
    def done(self) -> bool:
        return self.generation.done


class Batch:
    """The running rows of one decoder. One thread calls `join` and `step`.

    Attributes:
        failures: forwards that have failed in a row.
    """

    def __init__(self, decoder: Decoder, size: BatchSize, *, device: torch.device) -> None:
        self.failures = 0
        self._decoder = decoder
        self._size = size
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
        return self._size.rows - len(self._rows)

    def join(self, generation: Generation) -> None:
        """Give a request the first free place; it takes part from the next step on."""
        taken = {row.place for row in self._rows}
        place = next(place for place in range(self._size.rows) if place not in taken)
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
            if row.done and row.held and row.missing > 1:
                self._decoder.cache.clear(row.place)
        self._rows = [row for row in self._rows if not row.done]
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
        if not unread or unread[0].held or unread[0].missing > self._size.prefill:
            return unread[:1]
        chosen: list[_Row] = []
        for row in unread:
            width = max(other.missing for other in [*chosen, row])
            if width * (len(chosen) + 1) > self._size.prefill:
                break
            chosen.append(row)
        return sorted(chosen, key=lambda row: row.place)

    def _read(self, rows: list[_Row]) -> None:
        counts = [min(row.missing, self._size.prefill) for row in rows]
        ids = [
            row.generation.ids[row.held : row.held + count] for row, count in zip(rows, counts, strict=True)
        ]
        width = max(counts)
        padded = [own + own[-1:] * (width - len(own)) for own in ids]
        logits = self._logits(rows, padded, counts, self._route(rows))
        finished = [position for position, row in enumerate(rows) if row.missing == 0]
        self._push([rows[position] for position in finished], logits[finished])

    def _decode(self, rows: list[_Row]) -> None:
        if self._routed[0] != rows:
            self._routed = rows, self._route(rows)
        logits = self._logits(
            rows, [row.generation.ids[-1:] for row in rows], [1] * len(rows), self._routed[1]
        )
        self._push(rows, logits)

    def _logits(self, rows: list[_Row], ids: list[list[int]], counts: list[int], routing: Routing) -> Tensor:
        tokens = torch.tensor(ids, dtype=torch.long, device=self._device)
        step = Step(tokens, [row.place for row in rows], [row.held for row in rows], counts)
        logits = self._decoder.forward(step, routing)
        for row, count in zip(rows, counts, strict=True):
            row.held += count
        return logits

    def _push(self, rows: list[_Row], logits: Tensor) -> None:
        if not rows:
            return
        tokens, logprobs = choose([row.generation for row in rows], logits)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                row.generation.fail(_not_finite(row.generation))
                self._decoder.cache.clear(row.place)
            elif not row.done:  # cancelled during the forward, or failed at its choice
                row.generation.push(token, logprob)

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
def choose(rows: Sequence[Generation], logits: Tensor) -> tuple[list[int], list[float]]:
    """A token and its logprob for every row of `logits` (b, v); a row without a valid choice fails alone."""
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
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - total
    return chosen.tolist(), logprobs.tolist()


def _not_finite(row: Generation) -> RequestError:
    return failed(f"the logits of adapter {row.job.resolved.adapter_id!r} are not finite")
