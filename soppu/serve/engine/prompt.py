"""Prompts to token ids, within a server's limits and without one client's prompt delaying another's."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
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
        self._reach = characters_per_token(tokenizer)
        tokenizer("")  # switches off what truncation and padding its file asks for, before there are threads

    def read(self, request: GenerationRequest) -> tuple[tuple[int, ...], int]:
        """A prompt's ids, and how many tokens may be generated. RequestError 422 too long, 429 too busy."""
        if request.truncate is not None and request.truncate > self.max_input:
            raise invalid(
                f"`truncate` must be strictly positive and less than {self.max_input}."
                f" Given: {request.truncate}"
            )
        if len(request.inputs) > _LONG and request.truncate is None and self._reach:
            self._check(-(-len(request.inputs) // self._reach), request.max_new_tokens, least="at least ")
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


def characters_per_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many characters of a text one token can stand for, at most; 0 where nothing proves a limit.

    A limit is proven for BPE over bytes (GPT-2's way or SentencePiece's) with all 256 bytes in the
    vocabulary, where no character is dropped, fused into an unknown token, or taken by an added token beside.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return 0
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return 0
    steps = _steps(backend.pre_tokenizer)
    if not all(kind["type"] in _PRE_TOKENIZERS and kind.get("behavior") != "Removed" for kind in steps):
        return 0
    vocabulary, normalizers, shrink = backend.get_vocab(), _steps(backend.normalizer), 1
    for kind in normalizers:
        shrink *= _shrink(kind)
    byte_level = any(kind["type"] == "ByteLevel" for kind in [*steps, *normalizers])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if backend.model.byte_fallback else [""]
    if not all(byte in vocabulary for byte in (ByteLevel.alphabet() if byte_level else fallback)):
        return 0
    return shrink * max(map(len, vocabulary))


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
