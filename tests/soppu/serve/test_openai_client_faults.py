"""What goes wrong between the real OpenAI client and a server: it raises its own errors, rows are freed."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.soppu.serve import tiny
from tests.soppu.serve.openai_asking import PROMPT, RENDERED, SAID, Served, served
from tests.soppu.serve.talking import talker

__all__ = ["served"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_raise_the_clients_own_classes(served: Served, stream: bool) -> None:
    text, chat = served.client.completions.create, served.client.chat.completions.create
    bishop: Any = [{"role": "bishop", "content": "x"}]
    for call, status, kind, why in (
        (
            lambda: text(model="nobody", prompt="x", stream=stream),
            424,
            "generation",
            "'nobody' is not served",
        ),
        (lambda: chat(model="nobody", messages=SAID, stream=stream), 424, "generation", "'nobody' is not"),
        (
            lambda: chat(model="", messages=SAID, top_p=2, stream=stream),
            422,
            "validation",
            "`top_p` must be > 0",
        ),
        (
            lambda: text(model="", prompt="x", max_tokens=999, stream=stream),
            422,
            "validation",
            "`prompt` tokens + `max_tokens` must be <= 128",
        ),
        (
            lambda: chat(model="", messages=SAID, max_completion_tokens=999, stream=stream),
            422,
            "validation",
            "`messages` tokens + `max_completion_tokens` must be <= 128",
        ),
        (lambda: chat(model="", messages=bishop, stream=stream), 422, "template_error", "no bishops"),
    ):
        with pytest.raises(openai.APIStatusError) as failure:
            call()
        assert isinstance(failure.value, openai.UnprocessableEntityError) == (status == 422)
        assert (failure.value.status_code, failure.value.response.json()["error_type"]) == (status, kind)
        assert why in str(failure.value.body)  # LoRAX's `error` is a string, which the client keeps there


def test_a_model_that_nobody_has_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        served.client.models.retrieve("nobody")
    assert failure.value.body == "model 'nobody' is not served here; 3 are"


def test_an_error_inside_a_stream_ends_it(served: Served) -> None:
    calls = iter(range(100))

    def break_third(*_: object) -> None:
        if next(calls) == 2:
            raise ValueError("boom")

    handle = served.talker.model.lm_head.register_forward_hook(break_third)
    try:
        stream = served.client.chat.completions.create(model="", messages=SAID, n=2, stream=True)
        with pytest.raises(openai.APIError) as failure:
            list(stream)
    finally:
        handle.remove()
    assert "ValueError: boom" in str(failure.value.body)


def test_a_full_server_is_a_rate_limit(tmp_path: Any) -> None:
    with talker(tmp_path, max_batch=2, max_queue=0) as server, tiny.listening(server.app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as failure:
            client.chat.completions.create(model="", messages=SAID)
    assert failure.value.body == "Model is overloaded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(served: Served, stream: bool) -> None:
    engine, steps = served.talker.engine, []
    endless = {"extra_body": {"ignore_eos_token": True}}

    def slow(*_: object) -> None:
        time.sleep(0.02)
        steps.append(1)

    handle = served.talker.model.lm_head.register_forward_hook(slow)
    try:
        if stream:
            create = served.client.chat.completions.create
            with create(model="", messages=SAID, n=2, stream=True, **endless) as chunks:
                assert [len(chunk.choices) for chunk, _ in zip(chunks, range(4), strict=False)] == [1] * 4
        else:
            with pytest.raises(openai.APITimeoutError):
                served.client.completions.create(model="", prompt=PROMPT, n=2, timeout=0.3, **endless)
        end = time.monotonic() + 10
        while engine.running or engine.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        handle.remove()
    assert 0 < len(steps) < 128 - served.tokens(RENDERED)  # not to their ends
