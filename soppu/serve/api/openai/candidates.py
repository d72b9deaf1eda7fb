"""The generations of one request side by side, and the text of each as OpenAI shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from soppu.errors import RequestError
from soppu.serve.api.requests import ParsedRequest
from soppu.serve.api.streams import next_event, submit
from soppu.serve.engine.best_of import mean_logprob
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Event, Finish, Generation, TokenEvent


@dataclass(frozen=True)
class Piece:
    """What one token adds to the answer's text, and where the token's own text begins in the whole."""

    text: str
    token: TokenEvent
    offset: int


class Transcript:
    """The text of one generation, without the stop sequence that ends it.

    Text that may turn out to be the beginning of a stop sequence is held back until that is known. A stop
    sequence may hold the spelling of special tokens, which are never part of the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.pieces: list[Piece] = []
        self.finish: Finish | None = None
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._text = ""
        self._shown = 0
        self._spelled = ""  # the end of the text with its special tokens

    @property
    def text(self) -> str:
        """All that has been shown."""
        return self._text[: self._shown]

    @property
    def mean_logprob(self) -> float:
        """How likely the model found it, a token."""
        return mean_logprob([piece.token for piece in self.pieces])

    def push(self, token: TokenEvent) -> Piece:
        """Take the next token; the piece's text may be shown now."""
        offset, shown = len(self._text), self._shown
        self._text += "" if token.special else token.text
        if self._longest:
            self._spelled = (self._spelled + token.text)[-self._longest :]
        piece = Piece("", token, offset)
        self.pieces.append(piece)
        if token.finish is not None:
            self.finish = token.finish
            # an ending token's own event does not have the bytes of a character held back before it
            self._text = token.finish.text.removesuffix(self._end_of(self._stop()))
            self._shown = len(self._text)
        else:
            self._shown = max(shown, len(self._text) - len(self._end_of(self._doubtful())))
        self.pieces[-1] = replace(piece, text=self._text[shown : self._shown])
        return self.pieces[-1]

    def _stop(self) -> str:
        """The stop sequence that ended the text, "" where it ended otherwise."""
        if self.finish is None or self.finish.reason != "stop_sequence":
            return ""
        return max((stop for stop in self._stops if self._spelled.endswith(stop)), key=len, default="")

    def _doubtful(self) -> str:
        """The longest end that a stop sequence begins with."""
        ends = (self._spelled[start:] for start in range(len(self._spelled)))
        return next((end for end in ends if any(stop.startswith(end) for stop in self._stops)), "")

    def _end_of(self, spelled: str) -> str:
        """What of this end is text, and not the spelling of special tokens."""
        left, text = len(spelled), ""
        for piece in reversed(self.pieces):
            if left <= 0:
                break
            own = piece.token.text[-left:]
            left -= len(own)
            text = text if piece.token.special else own + text
        return text


class Candidates:
    """The generations of one request; their events come in one queue, each with its generation's number."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self.transcripts: list[Transcript] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    @classmethod
    async def submit(cls, engine: Engine, requests: Sequence[ParsedRequest]) -> Candidates:
        """Queue all of them, or none. RequestError as `Engine.submit`."""
        candidates = cls()
        try:
            for index, parsed in enumerate(requests):
                candidates.transcripts.append(Transcript(parsed.generation.stop))
                put = partial(candidates.put, index)
                candidates.generations.append(await submit(engine, parsed, put))
        except BaseException:
            candidates.cancel()
            raise
        return candidates

    def put(self, index: int, event: Event) -> None:
        """An event of a generation; an error ends the whole request."""
        self._events.put_nowait((index, event))

    def cancel(self) -> None:
        """Those that are not finished leave the batch."""
        for generation in self.generations:
            generation.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """Pieces as they come, each with its generation's number, until all are finished; None meanwhile.

        Raises:
            RequestError: one of them failed. All are cancelled when the iteration ends, however it does.
        """
        under_way = len(self.generations)
        try:
            while under_way:
                if (numbered := await next_event(self._events)) is None:
                    yield None
                    continue
                index, event = numbered
                if isinstance(event, RequestError):
                    raise event
                under_way -= event.finish is not None
                yield index, self.transcripts[index].push(event)
        finally:
            self.cancel()

    def finishes(self) -> list[Finish]:
        """How each of them ended, once all have."""
        return [transcript.finish for transcript in self.transcripts if transcript.finish is not None]

    def whole(self, each: int) -> Finish:
        """All of them as one, `each` of one prompt: tokens add up, and a prompt counts once."""
        finishes = self.finishes()
        return replace(
            finishes[0],
            prompt_tokens=sum(finish.prompt_tokens for finish in finishes[::each]),
            generated_tokens=sum(finish.generated_tokens for finish in finishes),
            queued=max(finish.queued for finish in finishes),
            first=min(finish.first for finish in finishes),
            total=max(finish.total for finish in finishes),
        )

    def best(self, each: int, count: int) -> list[Transcript]:
        """Of each prompt's `each` generations the `count` likeliest, or all in their order."""
        if each == count:
            return self.transcripts
        groups = [self.transcripts[start : start + each] for start in range(0, len(self.transcripts), each)]
        return [
            transcript
            for group in groups
            for transcript in sorted(group, key=lambda transcript: -transcript.mean_logprob)[:count]
        ]
