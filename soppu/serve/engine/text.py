"""Token ids to text: what is shown of it, and where a stop sequence ends it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Token ids to text deltas that concatenate to the decoded text. Not for stop sequences.

    A byte-level token may end inside a character: those bytes are held back until the character is whole, or
    until `flush`. Only a short window is decoded for each token, so a text of n tokens costs O(n).
    Only for invalid UTF-8 from SentencePiece's byte tokens may the deltas differ from the decoded whole: its
    decoder takes back bytes. tokenizers' `DecodeStream` raises there and cannot be flushed, hence this class.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = not special  # special tokens are no part of the text
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        self._settled = 0  # first token whose text is not entirely out
        self._shown = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The text this token completes, often "" in the middle of a character."""
        self._ids.append(token_id)
        window = self._decode(self._ids[self._start :])
        whole = window.rstrip(_INCOMPLETE)
        delta = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if delta and whole == window:  # a token without text gives the next one no context
            self._start, self._settled = self._settled, len(self._ids)
            self._shown = len(self._decode(self._ids[self._start :]))
        return delta

    def peek(self, token_id: int) -> str:
        """The text this token would complete, which changes nothing."""
        return self._decode([*self._ids[self._start :], token_id]).rstrip(_INCOMPLETE)[self._shown :]

    def flush(self) -> str:
        """What was held back, as replacement characters: call once, at the end."""
        return self._decode(self._ids[self._start :])[self._shown :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopFinder:
    """Finds the first stop sequence in the text decoded with its special tokens, as LoRAX looks for them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._stops = stops
        self._detokenizer = Detokenizer(tokenizer, special=True)
        self._kept = max(map(len, stops), default=1) - 1  # characters in which a stop may have begun
        self._tail = ""

    def push(self, token_id: int) -> int | None:
        """Characters of this token's text behind the first stop sequence it completes; None for no stop."""
        if not self._stops:
            return None
        text = self._tail + self._detokenizer.push(token_id)
        ends = [text.find(stop) + len(stop) for stop in self._stops if stop in text]
        self._tail = text[len(text) - self._kept :] if self._kept < len(text) else text
        return len(text) - min(ends) if ends else None
