"""Prompts to token ids, within a server's limits and without one client's prompt delaying another's."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.refusals import invalid, overloaded

_LONG = 1 << 14  # characters; what is shorter takes a few milliseconds
_WAITING = 16  # long prompts at once; one more is refused, so that they never hold all of a server's threads
# How many characters one of these can turn into one, at most; what is not here may drop text.
_NORMALIZERS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1, "Lowercase": 1}
_PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Metaspace", "Punctuation")


class Prompts:
    """Tokenizes prompts and holds them to a server's limits. Many threads call `read` at once.

    Short prompts never wait: a fast tokenizer encodes in many threads, as long as nobody changes its
    truncation or padding. Long ones are tokenized one after the other, those too long by their characters
    alone not at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_input: int, max_total: int) -> None:
        self.max_input = max_input
        self.max_total = max_total
        self._tokenizer: Any = tokenizer
        self._alone = contextlib.nullcontext() if tokenizer.is_fast else threading.Lock()
        self._long = threading.Lock()
        self._places = threading.BoundedSemaphore(_WAITING)
        self._bound = token_bound(tokenizer)
        tokenizer("")  # switches off what truncation and padding its file asks for, before there are threads

    def read(self, request: GenerationRequest) -> tuple[tuple[int, ...], int]:
        """A prompt's ids, and how many tokens may be generated. RequestError 422 too long, 429 too busy."""
        if request.truncate is not None and request.truncate > self.max_input:
            raise invalid(
                f"`truncate` must be strictly positive and less than {self.max_input}."
                f" Given: {request.truncate}"
            )
        if len(request.inputs) > _LONG and request.truncate is None:
            self._check(self._bound.fewest(request.inputs), request.max_new_tokens, least="at least ")
        ids = self._encode(request)
        if not ids:
            raise invalid("`inputs` cannot be empty")
        self._check(len(ids), request.max_new_tokens)
        new = request.max_new_tokens
        return tuple(ids), self.max_total - len(ids) if new is None else new

    def _check(self, count: int, new: int | None, *, least: str = "") -> None:
        if new is not None and count + new > self.max_total:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {self.max_total}."
                f" Given: {least}{count} `inputs` tokens and {new} `max_new_tokens`"
            )
        if count > self.max_input:
            raise invalid(f"`inputs` must have less than {self.max_input} tokens. Given: {least}{count}")

    def _encode(self, request: GenerationRequest) -> list[int]:
        with self._turn(len(request.inputs)), self._alone:
            ids: list[int] = self._tokenizer(
                request.inputs, add_special_tokens=request.add_special_tokens, return_attention_mask=False
            )["input_ids"]
        return ids if request.truncate is None else ids[-request.truncate :]

    @contextlib.contextmanager
    def _turn(self, characters: int) -> Iterator[None]:
        if characters <= _LONG:
            yield
            return
        if not self._places.acquire(blocking=False):
            raise overloaded()
        try:
            with self._long:
                yield
        finally:
            self._places.release()


@dataclass(frozen=True)
class TokenBound:
    """How few tokens a text can have."""

    reach: int = 0  # characters that one token can stand for, at most; 0 where nothing proves a limit
    lost: str = ""  # characters that may leave no token at all

    def fewest(self, text: str) -> int:
        """A text has this many tokens or more; 0 where nothing is known. O(n), a hundredth of tokenizing."""
        if not self.reach:
            return 0
        kept = len(text) - sum(map(text.count, self.lost))
        return -(-kept // self.reach)


def token_bound(tokenizer: PreTrainedTokenizerBase) -> TokenBound:
    """What a tokenizer's parts prove about the length of its output.

    A limit is proven for BPE over bytes, GPT-2's way or SentencePiece's, where a known set of characters at
    most is dropped or fused into an unknown token, and none is taken by an added token beside it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return TokenBound()
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return TokenBound()
    steps, normalizers = _steps(backend.pre_tokenizer), _steps(backend.normalizer)
    if not all(kind["type"] in _PRE_TOKENIZERS and kind.get("behavior") != "Removed" for kind in steps):
        return TokenBound()
    vocabulary = backend.get_vocab()
    lost = ""
    if any(kind["type"] == "ByteLevel" for kind in [*steps, *normalizers]):
        if not all(_spelled(0x80 + byte)[-1] in vocabulary for byte in range(64)):
            return TokenBound()  # what is not ASCII has one of these bytes, so that something of it is kept
        lost = "".join(chr(code) for code in range(128) if _spelled(code) not in vocabulary)
    elif not (backend.model.byte_fallback and all(f"<0x{n:02X}>" in vocabulary for n in range(256))):
        return TokenBound()
    return TokenBound(math.prod(map(_shrink, normalizers)) * max(map(len, vocabulary)), lost)


def _spelled(code: int) -> str:
    """A character as a vocabulary over bytes spells it."""
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(code))
    return "".join(piece for piece, _ in pieces)


def _steps(component: Any) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's settings, a sequence as its parts."""
    if component is None:
        return []
    settings: dict[str, Any] = json.loads(component.__getstate__())
    parts = settings.get("normalizers" if "normalizers" in settings else "pretokenizers")
    return [settings] if parts is None else parts


def _shrink(normalizer: dict[str, Any]) -> int:
    if normalizer["type"] != "Replace":
        return _NORMALIZERS.get(normalizer["type"], 0)
    pattern = normalizer["pattern"].get("String")
    return 1 if pattern and len(pattern) <= len(normalizer["content"]) else 0
