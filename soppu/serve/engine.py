"""Engine: a background thread that answers generation requests of many users in shared batches.

Not for HTTP. A batch takes what waits when the one before it is empty; joining a running batch would be done
in `soppu.serve.batch`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soppu.serve.bank import AdapterBank
from soppu.serve.batch import Batch, Runner
from soppu.serve.generation import Generation, GenerationRequest, Job, Sink, Vocabulary
from soppu.serve.refusals import failed, incomplete, invalid, overloaded

_LOG = logging.getLogger(__name__)
_UNHEALTHY_AFTER = 3


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    Attributes:
        max_batch: rows decoded together.
        max_queue: requests that may wait; one more is refused with 429.
        max_input_tokens: longest prompt; the model's own limit may be lower.
        max_total_tokens: prompt and answer together; the model's own limit may be lower.
        gather_seconds: how long the first waiting request waits for company.
    """

    max_batch: int = 8
    max_queue: int = 128
    max_input_tokens: int = 1024
    max_total_tokens: int = 2048
    gather_seconds: float = 0.005


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
        positions = getattr(model.config, "max_position_embeddings", None) or options.max_total_tokens
        self.bank = bank
        self.options = options
        self.max_total_tokens = min(options.max_total_tokens, positions)
        self.max_input_tokens = min(options.max_input_tokens, self.max_total_tokens - 1)
        self._vocabulary = vocabulary(model, tokenizer)
        self._runner = Runner(model, bank.router, pad=tokenizer.pad_token_id or 0)
        self._waiting: deque[Generation] = deque()
        self._condition = threading.Condition()
        self._tokenizing = threading.Lock()
        self._closed = False
        self._failed_batches = 0
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
        """`alive`, and not three batches in a row have failed as a whole."""
        return self.alive and self._failed_batches < _UNHEALTHY_AFTER

    @property
    def waiting(self) -> int:
        """Requests not yet in a batch."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread; once started, it stays."""
        if not self._thread.is_alive() and not self._closed:
            self._thread.start()

    def close(self) -> None:
        """Stop after the step under way; whatever is not finished fails with `incomplete_generation`."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        while self._waiting:
            self._waiting.popleft().fail(incomplete())

    def submit(self, request: GenerationRequest, *, sink: Sink | None = None) -> Generation:
        """Queue a request; its adapter is resolved now.

        Args:
            sink: called from the engine's thread with every token, or with the error; by default the events
                wait in the returned generation.

        Raises:
            RequestError: 422 prompt too long, 424 adapter not served, 429 queue full, 500 engine closed.
        """
        resolved = self.bank.resolve(request.adapter_id)
        prompt, limit = self._prompt(request)
        generation = Generation(Job(request, resolved, prompt, limit), self._vocabulary, sink=sink)
        with self._condition:
            if self._closed:
                raise incomplete()
            if len(self._waiting) >= self.options.max_queue:
                self._purge()
            if len(self._waiting) >= self.options.max_queue:
                raise overloaded()
            self._waiting.append(generation)
            self._condition.notify_all()
        return generation

    def _prompt(self, request: GenerationRequest) -> tuple[tuple[int, ...], int]:
        if request.truncate is not None and request.truncate > self.max_input_tokens:
            raise invalid(
                f"`truncate` must be strictly positive and less than {self.max_input_tokens}."
                f" Given: {request.truncate}"
            )
        with self._tokenizing:
            ids = self._vocabulary.tokenizer(request.inputs)["input_ids"]
        if request.truncate is not None:
            ids = ids[-request.truncate :]
        count, new = len(ids), request.max_new_tokens
        if count == 0:
            raise invalid("`inputs` cannot be empty")
        if new is not None and count + new > self.max_total_tokens:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {self.max_total_tokens}."
                f" Given: {count} `inputs` tokens and {new} `max_new_tokens`"
            )
        if count > self.max_input_tokens:
            raise invalid(f"`inputs` must have less than {self.max_input_tokens} tokens. Given: {count}")
        return tuple(ids), self.max_total_tokens - count if new is None else new

    def _loop(self) -> None:
        while rows := self._gather():
            batch = None
            try:
                batch = Batch(self._runner, rows)
                while batch.rows and not self._closed:
                    batch.step()
                if not self._closed:
                    self._failed_batches = 0
            except (
                Exception
            ) as error:  # whatever one batch raises must not end the thread: its requests are told
                self._failed_batches += 1
                _LOG.exception("a batch of %d requests failed", len(rows))
                for row in rows:
                    row.fail(failed(f"{type(error).__name__}: {error}"))
            for row in rows:
                row.fail(incomplete())  # does nothing to a finished row

    def _gather(self) -> list[Generation]:
        """Wait for requests, then a moment for company. Empty means the engine was closed."""
        rows: list[Generation] = []
        with self._condition:
            while not rows:  # all that waited may have been cancelled
                self._condition.wait_for(lambda: self._closed or self._waiting)
                self._condition.wait_for(
                    lambda: self._closed or len(self._waiting) >= self.options.max_batch,
                    timeout=self.options.gather_seconds,
                )
                if self._closed:
                    return []
                self._purge()
                count = min(len(self._waiting), self.options.max_batch)
                rows = [self._waiting.popleft() for _ in range(count)]
        for row in rows:
            row.start()
        return rows

    def _purge(self) -> None:
        """Drop what was cancelled while it waited. The condition is held."""
        self._waiting = deque(row for row in self._waiting if not row.done)


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
