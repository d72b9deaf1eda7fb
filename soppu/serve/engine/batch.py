"""Batch: the running rows. A row joins or leaves at any step; in between all decode together.

Queueing and threads: `soppu.serve.engine.engine`; the model: `soppu.serve.decoders.decoder`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import functional as F

from soppu.errors import RequestError
from soppu.serve.decoders.decoder import Decoder
from soppu.serve.decoders.kv_cache import Step
from soppu.serve.decoders.pages import Key
from soppu.serve.decoders.row_pages import Want
from soppu.serve.engine.generation import Choice, Generation
from soppu.serve.layers.routing import Routing
from soppu.serve.refusals import failed

_LOG = logging.getLogger(__name__)
_MOST_PARTS = 4  # times `prefill` tokens, at most, are read in a step where others have read the lower layers


@dataclass(eq=False)
class _Row:
    """A request, the `number`-th to arrive, and its place in the cache, which holds `held` of its ids.

    `begun` once some of its prompt was read for it.
    """

    generation: Generation
    place: int
    number: int
    held: int = 0
    begun: bool = False
    cuts: tuple[int, ...] = ()  # layers whose first states others may want

    @property
    def wants_prompt(self) -> bool:
        """True where the request wants to be told of its prompt's tokens."""
        return self.generation.job.request.prefill_details

    @property
    def missing(self) -> int:
        """Ids not yet in the cache; 1 where the prompt is read and only the next token is needed."""
        return len(self.generation.ids) - self.held


@dataclass(frozen=True, eq=False)
class _Stretch:
    """The next `count` tokens of a row, read from `layer` on; `key` is what others may find then."""

    row: _Row
    layer: int
    count: int
    key: Key | None


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
        """Places for rows that may join now."""
        return self._decoder.cache.rows - len(self._rows)

    def takes(self, generation: Generation) -> bool:
        """Whether a request may join now: there is a place, and room for all that it may become."""
        return self.free > 0 and self._decoder.cache.fits(_most(generation))

    def join(self, generation: Generation) -> None:
        """Give a request the first free place; it takes part from the next step on."""
        place = min(set(range(self._decoder.cache.rows)).difference(row.place for row in self._rows))
        self._joined += 1
        row = _Row(generation, place, self._joined)
        # who is told of every token of a prompt has to have it read
        parts = () if row.wants_prompt else self._decoder.parts(generation.job.resolved.where)
        row.cuts = tuple(part.end for part in parts[:-1])
        self._decoder.cache.open(place, Want(_most(generation), generation.job.prompt, parts))
        self._rows.append(row)
        self._rows.sort(key=attrgetter("place"))

    def step(self) -> None:
        """Read some prompt tokens of new rows, then decode one token for every row whose prompt is read.

        Rows that are finished or cancelled leave. A forward that fails ends only its own rows.
        """
        self.leave()
        if reading := self._next_to_read():
            self._forward([stretch.row for stretch in reading], partial(self._read, reading))
            self.leave()
        if decoding := [row for row in self._rows if row.missing == 1 and row.held]:
            self._forward(decoding, partial(self._decode, decoding))
            self.leave()

    def leave(self) -> None:
        """Remove the rows that are finished or cancelled; their places are free at once."""
        gone = [row for row in self._rows if row.generation.done]  # asked once: others may cancel meanwhile
        for row in gone:
            self._decoder.cache.close(row.place)
        self._rows = [row for row in self._rows if row not in gone]
        if not self._rows:
            self._routed = ([], Routing([]))  # which holds the tensors of a bundle version

    def fail(self, error: RequestError) -> None:
        """End all rows."""
        for row in self._rows:
            row.generation.fail(error)
        self.leave()

    def _next_to_read(self) -> list[_Stretch]:
        """What is read next: of the longest-waiting prompt, and of those that fit beside it, padded.

        What somebody has read before is taken over. A row that waits for what another one reads now takes it
        over at the next step.
        """
        unread = [row for row in self._rows if row.missing > 1 or not row.held]
        chosen: list[_Stretch] = []
        for row in sorted(unread, key=lambda row: (not row.begun, row.number)):
            if (stretch := self._stretch(row)) is None:
                continue
            if chosen:
                together = max(other.count for other in [*chosen, stretch]) * (len(chosen) + 1)
                if stretch.layer != chosen[0].layer or together > self._budget(stretch.layer):
                    break
            if stretch.key is None or stretch.key not in [other.key for other in chosen]:
                chosen.append(stretch)
        return sorted(chosen, key=lambda stretch: stretch.row.place)

    def _stretch(self, row: _Row) -> _Stretch | None:
        """What is to be read of a row next; None where only the token is left that it decodes with others."""
        cache = self._decoder.cache
        if not row.begun:
            row.held = cache.adopt(row.place)
            if row.missing == 1 and row.held:
                return None
        layer, end = cache.stretch(row.place, row.held)
        rest = (len(row.generation.ids) if end is None else end) - row.held
        key = cache.next_key(row.place, row.held)
        return _Stretch(row, layer, min(rest, self._budget(layer)), key)

    def _budget(self, layer: int) -> int:
        """How many tokens may be read in a step from a layer on: fewer layers take less time."""
        layers = self._decoder.cache.sizes.layers
        return min(_MOST_PARTS, layers // (layers - layer)) * self._prefill

    def _read(self, reading: list[_Stretch]) -> None:
        rows = [stretch.row for stretch in reading]
        step = self._reading_step(reading)
        for row in rows:
            row.begun = True
        if step.every:
            logits = self._read_aloud(rows, step)
        else:
            logits = self._logits(rows, step, self._route(rows))
        self._decoder.cache.keep(step)
        finished = [position for position, row in enumerate(rows) if row.missing == 0]
        if finished:
            self._push([rows[position] for position in finished], logits[finished])

    def _reading_step(self, reading: list[_Stretch]) -> Step:
        rows, width = [stretch.row for stretch in reading], max(stretch.count for stretch in reading)
        layer, cache = reading[0].layer, self._decoder.cache
        ids, states = [], []
        for row, count in ((stretch.row, stretch.count) for stretch in reading):
            own = row.generation.ids[row.held : row.held + count]
            ids.append(own + own[-1:] * (width - count))
            if layer:
                given = cache.states(row.place, layer, row.held, row.held + count)
                states.append(F.pad(given, (0, 0, 0, width - count)))
        every = any(row.wants_prompt for row in rows)
        return replace(
            self._step(rows, ids, [stretch.count for stretch in reading]),
            every=every,
            silent=not every and all(stretch.count < stretch.row.missing for stretch in reading),
            first=layer,
            given=torch.stack(states) if layer else None,
            keep=frozenset(cut for row in rows for cut in row.cuts if cut > layer),
        )

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
            elif not row.generation.done:  # cancelled during the forward, or failed at its choice
                row.generation.push(choice)

    def _forward(self, rows: list[_Row], work: Callable[[], None]) -> None:
        try:
            work()
            self.failures = 0
        except Exception as error:  # of any kind: it ends this forward's requests, not the thread
            self.failures += 1
            _LOG.exception("a step of %d requests failed", len(rows))
            for row in rows:
                row.generation.fail(failed(f"{type(error).__name__}: {error}"))

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


def _most(generation: Generation) -> int:
    """Tokens that a request may become."""
    return len(generation.job.prompt) + generation.job.limit


def _not_finite(row: Generation) -> RequestError:
    return failed(f"the logits of adapter {row.job.resolved.adapter_id!r} are not finite")
