"""OpenAI's answers: whole ones and the events of a stream, for both routes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from soppu.serve.api.openai.candidates import Piece, Transcript
from soppu.serve.api.requests import Json
from soppu.serve.api.responses import token_body
from soppu.serve.engine.generation import Finish, ScoredToken

_FINISH_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


class Form(Protocol):
    """What differs between the routes."""

    prefix: str  # of ids
    whole: str  # `object` of a whole answer
    chunk: str  # and of an event

    def choice(self, transcript: Transcript, *, before: str) -> Json:
        """The text of a choice; `before` comes first in it."""

    def opening(self, before: str) -> Json | None:
        """What a choice's first event holds before any token, if there is such an event."""

    def delta(self, text: str) -> Json:
        """The text of one event."""

    def logprobs(self, pieces: Sequence[Piece], prompt: Sequence[ScoredToken] = ()) -> Json:
        """Logprobs of every token; `prompt` are those that come before the text."""


class CompletionForm:
    """`/v1/completions`."""

    prefix = "cmpl-"
    whole = chunk = "text_completion"

    def choice(self, transcript: Transcript, *, before: str) -> Json:
        """The text."""
        return {"text": before + transcript.text}

    def opening(self, before: str) -> Json | None:
        """The prompt, where it is echoed."""
        return {"text": before} if before else None

    def delta(self, text: str) -> Json:
        """The text."""
        return {"text": text}

    def logprobs(self, pieces: Sequence[Piece], prompt: Sequence[ScoredToken] = ()) -> Json:
        """Four lists, with an entry for each token; of the prompt's no others are known."""
        bodies = [token_body(piece.token) for piece in pieces]
        top = [{o["text"]: o["logprob"] for o in body.get("alternative_tokens", ())} for body in bodies]
        starts = [0, *accumulate(len(token.text) for token in prompt)]
        return {
            "tokens": [token.text for token in prompt] + [body["text"] for body in bodies],
            "token_logprobs": [token.logprob for token in prompt] + [body["logprob"] for body in bodies],
            "top_logprobs": [*[None] * len(prompt), *top] if any(top) else None,
            "text_offset": starts[:-1] + [starts[-1] + piece.offset for piece in pieces],
        }


class ChatForm:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, transcript: Transcript, *, before: str) -> Json:
        """The assistant's message."""
        return {"message": {"role": "assistant", "content": before + transcript.text}}

    def opening(self, before: str) -> Json | None:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": before}}

    def delta(self, text: str) -> Json:
        """The text; nothing where there is none, as at the end."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, pieces: Sequence[Piece], prompt: Sequence[ScoredToken] = ()) -> Json:
        """An object for each token of the text."""
        content = []
        for piece in pieces:
            body = token_body(piece.token)
            others = [_token(other) for other in body.get("alternative_tokens", ())]
            content.append(_token(body) | {"top_logprobs": others})
        return {"content": content, "refusal": None}


def _token(body: Json) -> Json:
    return {"token": body["text"], "logprob": body["logprob"], "bytes": list(body["text"].encode())}


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    form: Form
    model: str
    fingerprint: str
    logprobs: bool
    counted: bool = False  # its stream tells the usage
    number: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, transcripts: Sequence[Transcript], *, before: Sequence[str], finish: Finish) -> Json:
        """The body of an answer that is not a stream."""
        choices = [
            {
                "index": index,
                **self.form.choice(transcript, before=start),
                "logprobs": self._logprobs(transcript),
                "finish_reason": _reason(transcript.finish),
            }
            for index, (transcript, start) in enumerate(zip(transcripts, before, strict=True))
        ]
        return {**self._head(self.form.whole), "choices": choices, "usage": usage(finish)}

    def opening(self, index: int, before: str) -> Json | None:
        """The first event of a choice, if there is one before its first token."""
        return self._event(index, opening) if (opening := self.form.opening(before)) is not None else None

    def events(self, index: int, piece: Piece) -> list[Json]:
        """The events of one token: none while its text is held back."""
        logprobs = self.form.logprobs([piece]) if self.logprobs else None
        events = []
        if piece.text or logprobs:
            events.append(self._event(index, self.form.delta(piece.text), logprobs=logprobs))
        if piece.token.finish:
            events.append(self._event(index, self.form.delta(""), reason=_reason(piece.token.finish)))
        return events

    def counts(self, finish: Finish) -> Json:
        """The last event, of which nothing but the usage is new."""
        return {**self._head(self.form.chunk), "choices": [], "usage": usage(finish)}

    def _logprobs(self, transcript: Transcript) -> Json | None:
        prompt = transcript.finish.prefill if transcript.finish else ()
        return self.form.logprobs(transcript.pieces, prompt) if self.logprobs else None

    def _event(
        self, index: int, own: Json, *, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, **own, "logprobs": logprobs, "finish_reason": reason}
        body = {**self._head(self.form.chunk), "choices": [choice]}
        return {**body, "usage": None} if self.counted else body

    def _head(self, kind: str) -> Json:
        return {
            "id": self.form.prefix + self.number,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(finish: Finish) -> Json:
    """Counts of tokens."""
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.generated_tokens,
        "total_tokens": finish.prompt_tokens + finish.generated_tokens,
    }


def _reason(finish: Finish | None) -> str | None:
    return _FINISH_REASONS[finish.reason] if finish else None
