"""Streams to the real OpenAI client: whole characters, no stop sequence, and never silent for long."""

from __future__ import annotations

import time
from typing import Any

import pytest

from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve.openai_asking import PROMPT, RENDERED, SAID, Served, served, shared, text_of

__all__ = ["served", "shared"]


def test_a_completions_stream_is_the_same_text_in_pieces(served: Served, shared: Bundle) -> None:
    chunks = list(
        served.client.completions.create(
            model="alice", prompt=PROMPT, max_tokens=6, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(shared, "alice", PROMPT)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_chats_stream_and_its_usage(served: Served, shared: Bundle) -> None:
    chunks = list(
        served.client.chat.completions.create(
            model="bob",
            messages=SAID,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, last = chunks
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (served.tokens(RENDERED), 6)
    assert all(chunk.usage is None for chunk in said)
    assert said[0].choices[0].delta.role == "assistant" and said[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in said[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert text == text_of(shared, "bob", RENDERED)
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + ["length"]
    assert said[-1].choices[0].delta.content is None


def test_characters_split_over_tokens_come_whole(served: Served) -> None:
    text = "žluť 🦊日"
    create = served.client.chat.completions.create
    with served.talker.says(text) as ids:
        assert len(ids) > len(text)
        chunks = list(create(model="", messages=SAID, temperature=0, stream=True))
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(said) == text and "\ufffd" not in "".join(said)
    assert chunks[-1].choices[0].finish_reason == "stop"
    half = served.talker.tokenizer("🐻")["input_ids"][:1]
    with served.talker.says("so", then=half):
        chunks = list(create(model="", messages=SAID, temperature=0, stream=True))
    with served.talker.says("so", then=half):
        whole = create(model="", messages=SAID, temperature=0).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole == "so\ufffd"


def test_the_clients_own_stream_helper_puts_a_chat_together(served: Served) -> None:
    with served.talker.says("the lazy dog"):
        asked: dict[str, Any] = {"model": "", "messages": SAID, "temperature": 0, "logprobs": True}
        with served.client.chat.completions.stream(**asked) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == final.message.content == "the lazy dog"
    assert final.finish_reason == "stop" and final.logprobs is not None and final.logprobs.content is not None
    assert final.logprobs.content[-1].token == "<eos>"


def test_a_silent_stream_is_kept_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soppu.serve.api.streams._KEEP_ALIVE_SECONDS", 0.02)
    handle = served.talker.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.1))
    asked: dict[str, Any] = {"model": "", "messages": SAID, "max_tokens": 2, "temperature": 0, "stream": True}
    try:
        with served.client.chat.completions.with_streaming_response.create(**asked) as response:
            raw = list(response.iter_lines())
        chunks = list(served.client.chat.completions.create(**asked))
    finally:
        handle.remove()
    assert ":" in raw and raw[-2:] == ["data: [DONE]", ""]
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["fox", ["zebra", "fox"]])
def test_a_stop_sequence_is_no_part_of_the_text(served: Served, stop: Any) -> None:
    with served.talker.says("the quick fo, fox jumps"):
        answer = served.client.completions.create(model="", prompt=PROMPT, temperature=0, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the quick fo, ", "stop")
    with served.talker.says("the quick fo, fox jumps"):
        chunks = list(
            served.client.chat.completions.create(
                model="", messages=SAID, temperature=0, stop=stop, stream=True
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the quick fo, "
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_sequence_may_name_a_special_token(served: Served) -> None:
    for stop in ("<pad>", "fox<pad>"):
        for stream in (False, True):
            with served.talker.says("the fox<pad> jumps"):
                answer: Any = served.client.completions.create(
                    model="", prompt=PROMPT, temperature=0, stop=stop, stream=stream
                )
                chunks = list(answer) if stream else [answer]
            assert (
                "".join(chunk.choices[0].text for chunk in chunks) == "the fox"[: 4 + 3 * (stop == "<pad>")]
            )
            assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_that_only_began_like_a_stop_sequence_is_not_lost(served: Served) -> None:
    with served.talker.says("the fo"):
        chunks = list(
            served.client.completions.create(model="", prompt=PROMPT, temperature=0, stop="fox", stream=True)
        )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the fo"
    assert chunks[-1].choices[0].finish_reason == "stop"
