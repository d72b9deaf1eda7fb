"""Engine: a queue, and a background thread that steps one batch of many users' requests.

A waiting request joins the batch at its next step with a free row. What a step does: `engine.batch`.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soppu.errors import ConfigError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.decoders.decoder import make_decoder
from soppu.serve.decoders.kv_cache import KVCache
from soppu.serve.engine.batch import Batch
from soppu.serve.engine.best_of import BestOf
from soppu.serve.engine.generation import Generation, GenerationRequest, Job, Sink, Vocabulary
from soppu.serve.engine.grammar import Grammars
from soppu.serve.engine.prompt import Prompts
from soppu.serve.refusals import incomplete, invalid, overloaded, stopping

_UNHEALTHY_AFTER = 3
_LEAST = {
    "max_batch": 1,
    "prefill_tokens": 1,
    "max_best_of": 1,
    "max_input_tokens": 0,
    "max_total_tokens": 0,
    "max_batch_total_tokens": 0,
    "prefix_tokens": 0,
}


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine; the model's own limits of tokens may be lower."""

    max_batch: int = 32  # rows decoded together
    max_queue: int = 128  # requests that may wait; one more is refused with 429
    max_input_tokens: int = 1024  # longest prompt; 0 leaves one token of the total for the answer
    max_total_tokens: int = 2048  # prompt and answer together; 0 is what the model can
    prefill_tokens: int = 256  # prompt tokens read in one step, which bounds how long decoding rows wait
    max_batch_total_tokens: int = 0  # kept at once, of requests and for later ones; 0: see `KVCache`
    prefix_tokens: int = 8192  # of those at most so many for later ones; 0 shares no prompts
    max_best_of: int = 2  # texts generated for one request, of which the likeliest is the answer
    gather_seconds: float = 0.002  # how long an idle engine waits for more requests after the first

    def __post_init__(self) -> None:
        """Refuse limits that no request could meet. Raises ConfigError."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)}, allowed: {least} and more")
        if self.max_total_tokens == 1:
            raise ConfigError("max_total_tokens: 1, allowed: 2 and more, or 0 for what the model can")


class Engine:
    """Generates text with the adapters of a bank. `start` it, or use it as a context manager."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: AdapterBank,
        options: EngineOptions | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.bank = bank
        self.options = options
        self.max_input_tokens, self.max_total_tokens = _limits(model, options)
        self._vocabulary = vocabulary(model, tokenizer)
        self._grammars = Grammars(
            tokenizer, eos=self._vocabulary.eos, width=model.get_output_embeddings().weight.shape[0]
        )
        self._prompts = Prompts(tokenizer, max_input=self.max_input_tokens, max_total=self.max_total_tokens)
        self.cache = KVCache(
            options.max_batch,
            self.max_total_tokens,
            tokens=options.max_batch_total_tokens,
            prefix=options.prefix_tokens,
        )
        decoder = make_decoder(model, bank.router, self.cache)
        self._batch = Batch(decoder, prefill=options.prefill_tokens, device=model.device)
        self._waiting: deque[Generation] = deque()
        self._condition = threading.Condition()
        self._draining = False  # nothing new is taken; set before `_closed`, and for good
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="soppu-engine", daemon=True)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """True while requests are being answered."""
        return self._thread.is_alive() and not self._closed

    @property
    def healthy(self) -> bool:
        """`alive`, not draining, and fewer than three steps in a row have failed."""
        return self.alive and not self._draining and self._batch.failures < _UNHEALTHY_AFTER

    @property
    def draining(self) -> bool:
        """True from the first `close` on: new requests are refused."""
        return self._draining

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self._vocabulary.tokenizer

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row of the batch."""
        return len(self._batch)

    def start(self) -> None:
        """Start the thread; once started, it stays."""
        if not self._thread.is_alive() and not self._closed:
            self._thread.start()

    def close(self, *, grace: float = 0.0) -> None:
        """Take nothing new, go on with what was taken for at most `grace` seconds, then stop.

        What is unfinished then fails with `incomplete_generation`. Any thread may call this at any time, and
        again: a second call with less grace shortens the first. It returns when the engine has stopped.
        """
        with self._condition:
            self._draining = True
            if self._thread.is_alive():
                self._condition.wait_for(lambda: self._closed or not self._busy, timeout=grace)
            self._closed = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_waiting()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting) or len(self._batch) > 0

    def read(self, request: GenerationRequest) -> tuple[int, ...]:
        """The ids of a request's prompt, as it would be read. RequestError as `submit`."""
        return self._prompts.read(request)[0]

    def submit(self, request: GenerationRequest, *, sink: Sink | None = None) -> Generation:
        """Queue a request; its adapter is resolved now.

        `sink` is called from the engine's thread with every token, or with the error; by default these wait
        in the generation.

        Raises:
            RequestError: 422 prompt too long, 424 adapter not served, 429 queue full, 503 engine closing.
        """
        if self._draining:
            raise stopping()
        if request.best_of > self.options.max_best_of:
            raise invalid(
                f"`best_of` must be > 0 and <= {self.options.max_best_of}. Given: {request.best_of}"
            )
        generation = self._prepare(request, sink)
        with self._condition:
            if self._draining:
                raise stopping()
            self._purge()
            if len(self._waiting) + len(generation.rows) > self.options.max_queue:
                raise overloaded()
            self._waiting.extend(generation.rows)
            self._condition.notify_all()
        return generation

    def _prepare(self, request: GenerationRequest, sink: Sink | None) -> Generation:
        resolved = self.bank.resolve(request.adapter_id)
        matcher = None if request.schema is None else self._grammars.matcher(request.schema)
        prompt, limit = self._prompts.read(request)
        texts: list[str] = []
        if request.prefill_details:
            texts = self._vocabulary.tokenizer.batch_decode([[token_id] for token_id in prompt])
        job = Job(request, resolved, prompt, limit, tuple(texts))
        kind = BestOf if request.best_of > 1 else Generation
        return kind(job, self._vocabulary, sink=sink, matcher=matcher)

    def _loop(self) -> None:
        try:
            while self._admit():
                self._batch.step()
        finally:  # however the thread ends, every request gets an answer
            with self._condition:
                self._draining = self._closed = True
                self._condition.notify_all()
            self._batch.fail(incomplete())
            self._refuse_waiting()

    def _admit(self) -> bool:
        """Give free rows to waiting requests; with no row running, wait for one. False once closed."""
        with self._condition:
            while not self._closed:
                if not len(self._batch):
                    self._idle()
                self._purge()
                while self._waiting and self._batch.takes(self._waiting[0]):
                    row = self._waiting.popleft()
                    row.start()
                    self._batch.join(row)
                if len(self._batch):  # all waiting requests may have been cancelled
                    break
            return not self._closed

    def _idle(self) -> None:
        """Wait for a request, then a moment for more. The condition is held."""
        self._condition.notify_all()  # a `close` may wait for this moment
        self._condition.wait_for(lambda: self._closed or self._waiting)
        self._condition.wait_for(
            lambda: self._closed or len(self._waiting) >= self.options.max_batch,
            timeout=self.options.gather_seconds,
        )

    def _refuse_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().fail(incomplete())

    def _purge(self) -> None:
        """Drop requests cancelled while they waited. The condition is held."""
        self._waiting = deque(row for row in self._waiting if not row.done)


def _limits(model: PreTrainedModel, options: EngineOptions) -> tuple[int, int]:
    """Tokens of the longest prompt, and of prompt and answer together. ConfigError where none is set."""
    able = getattr(model.config, "max_position_embeddings", None) or 0
    total = min(options.max_total_tokens or able, able or options.max_total_tokens)
    if total < 2:
        raise ConfigError("max_total_tokens: 0, but this model's configuration names no limit; give a number")
    if 0 < options.max_batch_total_tokens < total:
        raise ConfigError(
            f"max_batch_total_tokens: {options.max_batch_total_tokens}, allowed: {total} and more, as one"
            " request may have so many (max_total_tokens); or 0 for what the memory allows"
        )
    return min(options.max_input_tokens or total, total - 1), total


def vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The ids that end a text, from the generation config first as `generate` does, and the special ones."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    eos = configured if isinstance(configured, (list, tuple)) else [configured]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Vocabulary(
        tokenizer,
        eos=frozenset(int(index) for index in eos if index is not None),
        special=frozenset(special | set(tokenizer.all_special_ids)),
    )
