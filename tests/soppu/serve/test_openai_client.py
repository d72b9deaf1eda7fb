"""The real OpenAI client, unchanged, over real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from soppu import __version__
from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve import tiny
from tests.soppu.serve.talking import BUNDLE_ID, Talker, members, talker

PROMPT = "the quick"
SAID: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]
RENDERED = "system:be brief\nuser:the fox\nassistant:"


@dataclass(frozen=True)
class Served:
    client: OpenAI
    url: str
    talker: Talker

    def tokens(self, text: str) -> int:
        return len(self.talker.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with talker(tmp_path_factory.mktemp("openai") / "state", max_batch=8) as server:
        with tiny.listening(server.app) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            yield Served(client, url, server)


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return members()


def text_of(shared: Bundle, who: str, prompt: str) -> str:
    """What PEFT and generate give."""
    return tiny.peft_text(tiny.llama(), prompt, shared.reconstruct(who) if who else None, tokens=6)


@pytest.mark.parametrize("model", ["alice", "bob", "", "tiny", f"bob@{BUNDLE_ID[:8]}"])
def test_a_completion_is_the_models_own(served: Served, shared: Bundle, model: str) -> None:
    who = "" if model == "tiny" else model.partition("@")[0]
    before = int(time.time())
    answer = served.client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    assert answer.choices[0].text == text_of(shared, who, PROMPT)
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert before <= answer.created <= time.time()
    assert answer.model == (model or "tiny")
    version = BUNDLE_ID if who else tiny.BASE_HASH
    assert answer.system_fingerprint == f"{__version__}-{version[:12]}"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (served.tokens(PROMPT), 6)
    assert answer.usage.total_tokens == served.tokens(PROMPT) + 6


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


def test_a_chat_is_the_models_own_answer_to_the_template(served: Served, shared: Bundle) -> None:
    create = served.client.chat.completions.create
    answer = create(model="alice", messages=SAID, max_completion_tokens=6, temperature=0)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", text_of(shared, "alice", RENDERED))
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens == served.tokens(RENDERED)
    again = create(model="alice", messages=[*SAID, message, SAID[1]], max_tokens=2)  # as its users do
    assert again.usage is not None and again.usage.completion_tokens == 2


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


def test_the_async_client_asks_many_at_once(served: Served, shared: Bundle) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model=who, prompt=PROMPT, max_tokens=6, temperature=0)
                    for who in ("alice", "bob", "") * 3
                )
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [text_of(shared, who, PROMPT) for who in ("alice", "bob", "")] * 3


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


def test_n_choices_are_drawn_apart_and_a_seed_repeats_them(served: Served) -> None:
    def draw(seed: int, **more: Any) -> Any:
        return served.client.chat.completions.create(
            model="alice", messages=SAID, max_tokens=6, temperature=2.0, seed=seed, **more
        )

    first, second = draw(3, n=2), draw(3, n=2)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1] and len(set(texts)) == 2
    assert [choice.message.content for choice in second.choices] == texts
    assert draw(4).choices[0].message.content == texts[1]
    assert first.usage.completion_tokens == 12 and first.usage.prompt_tokens == served.tokens(RENDERED)
    streamed = ["", ""]
    for chunk in draw(3, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_many_prompts_echo_and_best_of(served: Served, shared: Bundle) -> None:
    create = served.client.completions.create
    answer = create(model="bob", prompt=[PROMPT, "lazy"], max_tokens=6, temperature=0, echo=True)
    expected = [prompt + text_of(shared, "bob", prompt) for prompt in (PROMPT, "lazy")]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == served.tokens(PROMPT) + served.tokens("lazy")
    streamed = ["", ""]
    for chunk in create(
        model="bob", prompt=[PROMPT, "lazy"], max_tokens=6, temperature=0, echo=True, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    drawn = {"model": "", "prompt": PROMPT, "max_tokens": 5, "temperature": 1.5, "seed": 1, "logprobs": 0}
    all_four, best = create(**drawn, n=4), create(**drawn, n=2, best_of=4)

    def likelihood(choice: Any) -> float:
        logprobs = choice.logprobs.token_logprobs
        return sum(logprobs) / len(logprobs)

    ranked = sorted(all_four.choices, key=likelihood, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None and best.usage.completion_tokens == sum(
        len(choice.logprobs.tokens) for choice in all_four.choices
    )


def test_logprobs_are_of_every_token(served: Served) -> None:
    create = served.client.completions.create
    answer = create(model="alice", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=0)
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert "".join(found.tokens) == text and len(found.tokens) == 5 and found.top_logprobs is None
    assert all(
        text[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens, strict=True)
    )
    asked: dict[str, Any] = {"model": "alice", "messages": SAID, "max_tokens": 5, "temperature": 0}
    chat = served.client.chat.completions.create(**asked, logprobs=True)
    content = chat.choices[0].logprobs.content
    assert content is not None and len(content) == 5 and all(token.logprob < 0 for token in content)
    joined = bytes(byte for token in content for byte in token.bytes or ())
    assert joined.decode() == chat.choices[0].message.content
    chunks = served.client.chat.completions.create(**asked, logprobs=True, stream=True, stop=["zebra"])
    streamed = [
        token
        for chunk in chunks
        if (logprobs := chunk.choices[0].logprobs)
        for token in logprobs.content or ()
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


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


def test_logprobs_of_other_tokens_and_of_an_echoed_prompt(served: Served) -> None:
    create = served.client.completions.create
    answer = create(model="alice", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True)
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert found is not None and found.tokens is not None and found.token_logprobs is not None
    assert found.top_logprobs is not None and found.text_offset is not None
    count = served.tokens(PROMPT)
    assert text.startswith(PROMPT) and "".join(found.tokens) == text and len(found.tokens) == count + 4
    assert found.text_offset == [len("".join(found.tokens[:index])) for index in range(count + 4)]
    first: Any = found.token_logprobs[0]
    assert first is None and all(logprob < 0 for logprob in found.token_logprobs[1:])
    assert found.top_logprobs[:count] == [None] * count
    for logprob, top in zip(found.token_logprobs[count:], found.top_logprobs[count:], strict=True):
        assert max(top.values()) == pytest.approx(logprob)
    asked: dict[str, Any] = {"model": "alice", "messages": SAID, "max_tokens": 4, "temperature": 0}
    chat = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    for told in chat.logprobs.content:
        assert len(told.top_logprobs) == 2 and told.top_logprobs[0].logprob == pytest.approx(told.logprob)


def test_a_chat_is_held_to_the_clients_own_model(served: Served) -> None:
    class Verdict(BaseModel):
        good: bool
        why: Literal["fox", "dog"]

    asked: dict[str, Any] = {"model": "alice", "messages": SAID, "temperature": 0}
    answer = served.client.chat.completions.parse(**asked, response_format=Verdict).choices[0]
    assert isinstance(answer.message.parsed, Verdict) and answer.finish_reason == "stop"
    bare = served.client.chat.completions.create(**asked, response_format={"type": "text"}, max_tokens=4)
    free = served.client.chat.completions.create(**asked, max_tokens=4)
    assert bare.choices == free.choices
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.UnprocessableEntityError) as failure:
        served.client.chat.completions.create(**asked, response_format=wrong)
    assert "`response_format.schema`" in str(failure.value.body)


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


def test_models_are_listed_and_found(served: Served) -> None:
    models = list(served.client.models.list())
    assert [model.id for model in models] == ["tiny", "alice", "bob"]
    assert {model.object for model in models} == {"model"}
    for model in models:
        assert served.client.models.retrieve(model.id) == model
    version = served.client.models.retrieve("bob@c0ffee")
    assert (version.id, version.to_dict()["version"]) == ("bob@c0ffee", BUNDLE_ID)


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
