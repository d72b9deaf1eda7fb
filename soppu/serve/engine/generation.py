"""One request on its way through the engine: what was asked, what has been generated, when it is finished.

Not for choosing tokens (`engine.sampling`) nor for running the model (`engine.batch`).
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from soppu.errors import RequestError
from soppu.serve.bank.bank import Resolved
from soppu.serve.engine.grammar import Matcher
from soppu.serve.engine.sampling import Sampler, Sampling
from soppu.serve.engine.text import Detokenizer, StopFinder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate."""

    inputs: str  # the prompt, not empty
    adapter_id: str = ""  # see `AdapterBank.resolve`; "" is the base model
    max_new_tokens: int | None = None  # None generates up to the server's limit
    stop: tuple[str, ...] = ()  # ends with the first of these that appears; a special token's name counts
    truncate: int | None = None  # keep only the last so many tokens of the prompt; None keeps all
    ignore_eos: bool = False  # go on after the end-of-text token
    add_special_tokens: bool = True  # False where the prompt names its special tokens itself, as templates do
    sampling: Sampling = field(default_factory=Sampling)
    best_of: int = 1  # generate so many texts and answer with the likeliest; they have to be sampled
    alternatives: int = 0  # tell so many of the likeliest tokens with every token
    prefill_details: bool = False  # tell the prompt's tokens, with logprobs
    schema: str | None = None  # a JSON schema, as JSON, that the text is held to


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, the ids that end a text, and the ids that are not text."""

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    special: frozenset[int]


@dataclass(frozen=True)
class ScoredToken:
    """A token that was read, or that might have been generated."""

    id: int
    text: str
    logprob: float | None  # None for a text's first token, or where the model rules the token out


@dataclass(frozen=True)
class Finish:
    """The end of a generation. Times are seconds; `first` and `total` count from the submission."""

    reason: str  # "eos_token", "stop_sequence" or "length"
    text: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None  # None where nothing was drawn
    queued: float
    first: float
    total: float
    prefill: tuple[ScoredToken, ...] = ()  # the prompt, where its details were asked for
    others: tuple[tuple[TokenEvent, ...], ...] = ()  # the texts that were not the best


@dataclass(frozen=True)
class TokenEvent:
    """One generated token."""

    id: int
    text: str  # what it adds to the text; a special token's own spelling, which is not part of the text
    logprob: float  # natural logarithm of the model's own probability, before penalty, temperature and cuts
    special: bool
    finish: Finish | None = None  # set on the last token only
    alternatives: tuple[ScoredToken, ...] = ()  # the likeliest tokens here, by the same probability


Event = TokenEvent | RequestError
Sink = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """A request ready to run: its prompt as ids, its adapter as resolved, and its limit of new tokens.

    `texts` are the prompt's tokens one by one, where the request wants to be told of them.
    """

    request: GenerationRequest
    resolved: Resolved
    prompt: tuple[int, ...]
    limit: int
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The next token of a row, and the likeliest ones, (id, logprob) each, where they were asked for."""

    token_id: int
    logprob: float
    likeliest: Sequence[tuple[int, float]] = ()


class Generation:
    """A submitted request. The engine pushes tokens; the caller iterates, or gives a `sink` of its own."""

    def __init__(
        self, job: Job, vocabulary: Vocabulary, *, sink: Sink | None = None, matcher: Matcher | None = None
    ) -> None:
        self.job = job
        self.ids = list(job.prompt)
        self.sampler = Sampler(job.request.sampling, prompt=len(job.prompt), matcher=matcher)
        self.read: list[float | None] = [None]  # logprobs of the prompt's tokens, where they are asked for
        self.done = False
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary.tokenizer)
        self._stops = StopFinder(vocabulary.tokenizer, job.request.stop)
        self._text = ""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sink = sink or self._events.put
        self._submitted = time.perf_counter()
        self._started = self._first = 0.0

    @property
    def rows(self) -> list[Generation]:
        """What the engine runs for this request."""
        return [self]

    def __iter__(self) -> Iterator[TokenEvent]:
        """Tokens as they come, until the last. Only without a sink. Raises RequestError where it failed."""
        while True:
            event = self._events.get()
            if isinstance(event, RequestError):
                raise event
            yield event
            if event.finish is not None:
                return

    def result(self) -> tuple[list[TokenEvent], Finish]:
        """Wait for the end: every token, and how it ended. Raises RequestError."""
        tokens = list(self)
        finish = tokens[-1].finish
        assert finish is not None
        return tokens, finish

    def cancel(self) -> None:
        """The request leaves its batch at the next step, without an event."""
        self.done = True

    def start(self) -> None:
        """Called by the engine when the request leaves the queue."""
        self._started = time.perf_counter()

    def push(self, choice: Choice) -> None:
        """Called by the engine with the next token."""
        self._first = self._first or time.perf_counter()
        token_id = choice.token_id
        self.ids.append(token_id)
        if self.sampler.matcher is not None:
            self.sampler.matcher.push(token_id)
        alternatives = tuple(ScoredToken(i, self._text_of(i), logprob) for i, logprob in choice.likeliest)
        special = token_id in self._vocabulary.special
        delta, behind = self._detokenizer.push(token_id), self._stops.push(token_id)
        reason = self._reason(token_id, stopped=behind is not None)
        if reason and (reason != "stop_sequence" or special):  # a special token is behind all text
            delta += self._detokenizer.flush()
        elif reason:
            delta = delta[: max(0, len(delta) - (behind or 0))]
        self._text += delta
        text = self._spelling(token_id) if special else delta
        if reason:  # never set to False: the caller may cancel at any moment
            self.done = True
        finish = self._finish(reason) if reason else None
        self._emit(TokenEvent(token_id, text, choice.logprob, special, finish, alternatives))

    def fail(self, error: RequestError) -> None:
        """Called by the engine when this request cannot go on."""
        if not self.done:
            self.done = True
            self._emit(error)

    def _text_of(self, token_id: int) -> str:
        """What a token would add here."""
        if token_id in self._vocabulary.special:
            return self._spelling(token_id)
        return self._detokenizer.peek(token_id)

    def _spelling(self, token_id: int) -> str:
        return str(self._vocabulary.tokenizer.decode([token_id]))

    def _emit(self, event: Event) -> None:
        try:
            self._sink(event)
        except Exception:  # a failed listener must not end the other rows of the batch
            _LOG.exception("a listener failed; its request is cancelled")
            self.done = True

    def _reason(self, token_id: int, *, stopped: bool) -> str:
        held = self.sampler.matcher is not None  # whose grammar has ended with the text
        if token_id in self._vocabulary.eos and (held or not self.job.request.ignore_eos):
            return "eos_token"
        if stopped:
            return "stop_sequence"
        return "length" if len(self.ids) - len(self.job.prompt) >= self.job.limit else ""

    def _finish(self, reason: str) -> Finish:
        return Finish(
            reason=reason,
            text=self._text,
            prompt_tokens=len(self.job.prompt),
            generated_tokens=len(self.ids) - len(self.job.prompt),
            seed=self.sampler.seed,
            queued=self._started - self._submitted,
            first=self._first - self._submitted,
            total=time.perf_counter() - self._submitted,
            prefill=tuple(map(ScoredToken, self.job.prompt, self.job.texts, self.read)),
        )
