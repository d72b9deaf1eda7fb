"""The real OpenAI client, unchanged, over real HTTP: answers are the model's own, with all it asks for."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from soppu import __version__
from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve import tiny
from tests.soppu.serve.openai_asking import PROMPT, RENDERED, SAID, Served, served, shared, text_of
from tests.soppu.serve.talking import BUNDLE_ID

__all__ = ["served", "shared"]


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


def test_models_are_listed_and_found(served: Served) -> None:
    models = list(served.client.models.list())
    assert [model.id for model in models] == ["tiny", "alice", "bob"]
    assert {model.object for model in models} == {"model"}
    for model in models:
        assert served.client.models.retrieve(model.id) == model
    version = served.client.models.retrieve("bob@c0ffee")
    assert (version.id, version.to_dict()["version"]) == ("bob@c0ffee", BUNDLE_ID)
