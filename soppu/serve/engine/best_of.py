"""Several texts for one request, of which the likeliest is the answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

from soppu.errors import RequestError
from soppu.serve.engine.generation import Event, Generation, Job, Sink, TokenEvent, Vocabulary
from soppu.serve.engine.grammar import Matcher


class BestOf(Generation):
    """A generation made of `best_of` rows. Its events come at the end: the row with the highest mean logprob.

    The other rows are in the last event's `finish.others`. A row that fails fails the whole.
    """

    def __init__(
        self, job: Job, vocabulary: Vocabulary, *, sink: Sink | None = None, matcher: Matcher | None = None
    ) -> None:
        super().__init__(job, vocabulary, sink=sink, matcher=matcher)
        self._told: list[list[TokenEvent]] = [[] for _ in range(job.request.best_of)]
        self._rows = [
            Generation(job, vocabulary, sink=self._listener(place), matcher=matcher and matcher.copy())
            for place in range(job.request.best_of)
        ]

    @property
    def rows(self) -> list[Generation]:
        """What the engine runs."""
        return self._rows

    def cancel(self) -> None:
        """All rows leave at the next step, without an event."""
        self.done = True
        for row in self._rows:
            row.cancel()

    def _listener(self, place: int) -> Callable[[Event], None]:
        return partial(self._hear, place)

    def _hear(self, place: int, event: Event) -> None:
        if isinstance(event, RequestError):
            self.fail(event)
            self.cancel()
            return
        self._told[place].append(event)
        if all(told and told[-1].finish for told in self._told) and not self.done:
            self.done = True
            self._tell()

    def _tell(self) -> None:
        ranked = sorted(self._told, key=mean_logprob, reverse=True)  # stable: of equals the first
        total = max(told[-1].finish.total for told in self._told if told[-1].finish)
        best, finish = ranked[0], ranked[0][-1].finish
        assert finish is not None
        others = tuple(tuple(told) for told in self._told if told is not best)
        for event in best[:-1]:
            self._emit(event)
        self._emit(
            dataclasses.replace(best[-1], finish=dataclasses.replace(finish, total=total, others=others))
        )


def mean_logprob(tokens: Sequence[TokenEvent]) -> float:
    """How likely the model found a text, a token."""
    return math.fsum(token.logprob for token in tokens) / len(tokens)
