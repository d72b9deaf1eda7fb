"""Token ids to text deltas that concatenate to the decoded text. Not for stop sequences."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns ids into text one token at a time.

    A byte-level token may end inside a character: those bytes are held back until the character is whole, or
    until `flush`. Only a short window is decoded for each token, so a text of n tokens costs O(n).
    Only for invalid UTF-8 from SentencePiece's byte tokens may the deltas differ from the decoded whole: its
    decoder takes back bytes. tokenizers' `DecodeStream` raises there and cannot be flushed, hence this class.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
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

    def flush(self) -> str:
        """What was held back, as replacement characters: call once, at the end."""
        return self._decode(self._ids[self._start :])[self._shown :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
