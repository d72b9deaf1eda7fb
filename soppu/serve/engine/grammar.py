"""Text held to a JSON schema while it is generated, by llguidance. Requests: `api.requests`."""

from __future__ import annotations

import threading

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from soppu.serve.refusals import invalid

# A schema is a stranger's program; one that costs more a step, while the other rows wait, fails its request.
_LIMITS = LLParserLimits(
    max_grammar_size=20_000, max_lexer_states=50_000, step_max_items=10_000, verbose_errors=False
)
_JSON = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?", "lenient": False}


class Matcher:
    """How far one text is into its grammar. One thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, width: int) -> Tensor:
        """(width,) bool: the tokens that may come next. RuntimeError where finding them costs too much."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        mask = np.zeros(width, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:width]
        mask[: len(known)] = known
        return torch.from_numpy(mask)

    def push(self, token_id: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token_id)

    def copy(self) -> Matcher:
        """The same place in the same grammar, for another text."""
        return Matcher(self._matcher.deep_copy())


class Grammars:
    """Makes matchers for one model's vocabulary. Its table of tokens is built at the first use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos: frozenset[int], width: int) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(eos)
        self._width = width
        self._lock = threading.Lock()
        self._table: LLTokenizer | None = None

    def matcher(self, schema: str) -> Matcher:
        """A matcher for the JSON that `schema`, itself JSON, describes.

        Raises:
            RequestError: 422 where the schema is wrong, or uses what cannot be held to; the keyword is named.
        """
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._eos:
            raise invalid("`response_format` needs a fast tokenizer and an end-of-text token")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)  # type: ignore[arg-type]
        except ValueError as error:
            raise invalid(f"`response_format.schema`: {error}") from None
        matcher = LLMatcher(self._whole_table(), grammar, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()  # the dearest step is often the first, and nobody waits for this thread
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())
            raise invalid(f"`response_format.schema` cannot be followed: {why[:300]}")
        return Matcher(matcher)

    def _whole_table(self) -> LLTokenizer:
        with self._lock:
            if self._table is None:
                width = max(self._width, len(self._tokenizer))
                self._table = from_tokenizer(self._tokenizer, n_vocab=width, eos_token=self._eos)
            return self._table
