"""What one example is: prompt and completion, a chat, or a piece of plain text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

HELD_OUT_ONE_IN = 4
VALIDATION_ONE_IN = 5  # of what is not held out
PASSAGE = 1000


@dataclass(frozen=True)
class Example:
    """What a user asked for and what they wrote; or a chat of `turns`; or text that is `plain`, no prompt.

    A turn is (role, content). What is learned is the completion, the assistant's turns, or all plain text.
    """

    prompt: str
    completion: str
    turns: tuple[tuple[str, str], ...] = ()
    plain: bool = False

    @classmethod
    def chat(cls, turns: tuple[tuple[str, str], ...]) -> Example:
        """A chat of (role, content)."""
        return cls("", "", turns)

    @classmethod
    def text(cls, text: str) -> Example:
        """Plain text, all of which is learned."""
        return cls("", text, plain=True)

    def digest(self) -> str:
        """Content hash: the order of a split does not depend on the order of a file."""
        parts = [self.prompt, self.completion]
        if self.turns or self.plain:
            parts += ["plain"] if self.plain else ["chat", json.dumps(self.turns)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_held_out(self) -> bool:
        """Whether this is one of the quarter that is never trained on, whatever any configuration says."""
        return int(self.digest()[:8], 16) % HELD_OUT_ONE_IN == 0

    def is_for_validation(self) -> bool:
        """Whether, if not held out, this is one to choose with: steps, step size, what the user is served."""
        return int(self.digest()[8:16], 16) % VALIDATION_ONE_IN == 0


@dataclass(frozen=True)
class Record:
    """One row of a source: the example, and its time in seconds since 1970 if the row has one."""

    example: Example
    date: float | None = None


def passages(text: str) -> list[Example]:
    """Plain text in pieces of at most `PASSAGE` characters, cut after a paragraph, a line or a word.

    The pieces depend on the text alone, not on a tokenizer or a setting: so does what is held out of them.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces, start = [], 0
    while start < len(text):
        end = _cut(text, start)
        if text[start:end].strip():
            pieces.append(Example.text(text[start:end]))
        start = end
    return pieces


def _cut(text: str, start: int) -> int:
    if len(text) - start <= PASSAGE:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, start + PASSAGE // 2, start + PASSAGE)
        if place >= 0:
            return place + len(mark)
    return start + PASSAGE
