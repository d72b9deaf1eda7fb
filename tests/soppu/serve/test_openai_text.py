"""The text that OpenAI's routes show: without its stop sequence, however it is cut into tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soppu.serve.api.openai.candidates import Transcript
from soppu.serve.engine.generation import Finish, TokenEvent

FINISH = Finish("length", "", 1, 1, None, 0.0, 0.0, 0.0)
TEXTS = st.lists(st.text("ab", max_size=3), min_size=1, max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def cut(pieces: list[str], stops: list[str]) -> list[str]:
    """The pieces up to the first stop sequence's end, as the engine sends them."""
    sent = ""
    for index, piece in enumerate(pieces):
        ends = [
            end
            for end in range(len(sent) + 1, len(sent) + len(piece) + 1)
            if any((sent + piece)[:end].endswith(stop) for stop in stops)
        ]
        if ends:
            return [*pieces[:index], piece[: ends[0] - len(sent)]]
        sent += piece
    return pieces


def shown(pieces: list[str], stops: list[str], *, reason: str) -> tuple[list[str], Transcript]:
    transcript = Transcript(stops)
    finish = replace(FINISH, reason=reason, text="".join(pieces))
    last = len(pieces) - 1
    events = [
        TokenEvent(5, piece, -1.0, False, finish if index == last else None)
        for index, piece in enumerate(pieces)
    ]
    return [transcript.push(event).text for event in events], transcript


@given(TEXTS, STOPS)
def test_what_is_shown_is_the_text_before_the_stop_sequence(pieces: list[str], stops: list[str]) -> None:
    sent = cut(pieces, stops)
    text = "".join(sent)
    ended = [stop for stop in stops if text.endswith(stop)]
    found, transcript = shown(sent, stops, reason="stop_sequence" if ended else "length")
    longest = max(map(len, ended), default=0)
    assert "".join(found) == transcript.text == text[: len(text) - longest]
    assert all(stop not in transcript.text for stop in stops)


@given(TEXTS, STOPS)
def test_nothing_is_held_back_longer_than_needed(pieces: list[str], stops: list[str]) -> None:
    transcript, whole = Transcript(stops), ""
    for piece in cut(pieces, stops):
        transcript.push(TokenEvent(5, piece, -1.0, False))
        whole += piece
        doubtful = [
            whole[start:] for start in range(len(whole)) if any(s.startswith(whole[start:]) for s in stops)
        ]
        if not any(whole.endswith(stop) for stop in stops):
            assert whole == transcript.text + max(doubtful, key=len, default="")


def test_special_tokens_are_no_text_and_bytes_held_back_come_with_the_end() -> None:
    transcript = Transcript(["<stop>"])
    transcript.push(TokenEvent(5, "so", -1.0, False))
    assert transcript.push(TokenEvent(0, "<eos>", -1.0, True)).text == ""
    end = TokenEvent(0, "<eos>", -1.0, True, replace(FINISH, reason="eos_token", text="so\ufffd"))
    assert transcript.push(end).text == "\ufffd"
    assert transcript.text == "so\ufffd"


@pytest.mark.parametrize(
    ("stops", "text"), [(["<end>"], "so x"), (["x<end>", "<end>"], "so "), (["o<pad> x<end>"], "s")]
)
def test_a_stop_sequence_may_spell_special_tokens(stops: list[str], text: str) -> None:
    transcript = Transcript(stops)
    end = replace(FINISH, reason="stop_sequence", text="so x")
    shown = [
        transcript.push(event).text
        for event in (
            TokenEvent(5, "so", -1.0, False),
            TokenEvent(1, "<pad>", -1.0, True),
            TokenEvent(6, " x", -1.0, False),
            TokenEvent(2, "<end>", -1.0, True, end),
        )
    ]
    assert "".join(shown) == transcript.text == text
    assert [piece.offset for piece in transcript.pieces] == [0, 2, 2, 4]
