"""The hub's own client, which LangChain's HuggingFaceEndpoint calls, unchanged, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, ValidationError

from soppu.compress.bundle.bundle import Bundle
from tests.soppu.serve import tiny
from tests.soppu.serve.talking import Talker, members, talker

PROMPT = "the quick"
SAID: list[Any] = [{"role": "user", "content": "the fox"}]
# as LangChain's endpoint asks where it is told nothing
LANGCHAIN: dict[str, Any] = {
    "top_p": 0.95,
    "typical_p": 0.95,
    "temperature": 0.8,
    "top_k": None,
    "repetition_penalty": None,
    "return_full_text": False,
    "truncate": None,
    "stop": [],
    "seed": None,
    "do_sample": False,
    "watermark": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Talker]]:
    with talker(tmp_path_factory.mktemp("hub") / "state", max_batch=8) as server:
        with tiny.listening(server.app) as url:
            yield url, server


@pytest.fixture(scope="module")
def client(served: tuple[str, Talker]) -> InferenceClient:
    return InferenceClient(served[0], token="none")


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return members()


@pytest.mark.parametrize("who", ["alice", "bob", ""])
def test_a_text_and_its_stream_are_the_models_own(client: InferenceClient, shared: Bundle, who: str) -> None:
    wanted = tiny.peft_text(tiny.llama(), PROMPT, shared.reconstruct(who) if who else None, tokens=6)
    asked: dict[str, Any] = {"max_new_tokens": 6, "adapter_id": who or None}
    assert client.text_generation(PROMPT, **asked) == wanted
    assert "".join(client.text_generation(PROMPT, stream=True, **asked)) == wanted
    full = client.text_generation(PROMPT, details=True, return_full_text=True, **asked)
    assert full.generated_text == PROMPT + wanted
    assert (full.details.finish_reason, full.details.generated_tokens) == ("length", 6)
    events = list(client.text_generation(PROMPT, details=True, stream=True, **asked))
    assert [event.token.id for event in events] == [token.id for token in full.details.tokens]
    last = events[-1]
    assert last.generated_text == wanted and last.details is not None
    assert last.details.generated_tokens == 6


@pytest.mark.parametrize("seed", [1, 2])
def test_langchains_defaults_sample(client: InferenceClient, seed: int) -> None:
    asked = LANGCHAIN | {"seed": seed, "max_new_tokens": 6}
    text = client.text_generation(PROMPT, details=True, **asked)
    assert text.details.generated_tokens == 6 and text.details.seed == seed
    assert client.text_generation(PROMPT, **asked) == text.generated_text
    assert "".join(client.text_generation(PROMPT, stream=True, **asked)) == text.generated_text


def test_a_stop_sequence_ends_a_text(client: InferenceClient, served: tuple[str, Talker]) -> None:
    with served[1].says("the fox jumps"):
        assert client.text_generation(PROMPT, stop=["fox"], max_new_tokens=30).endswith("fox")
    with served[1].says("the fox jumps"):
        last = list(client.text_generation(PROMPT, stop=["fox"], stream=True, details=True))[-1]
    assert last.details is not None and last.details.finish_reason == "stop_sequence"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "error", "why"),
    [
        ({"adapter_id": "nobody"}, GenerationError, "'nobody' is not served here"),
        ({"temperature": -1.0}, ValidationError, "`temperature` must be"),
        ({"watermark": True}, ValidationError, "`watermark`"),
    ],
)
def test_errors_raise_the_clients_own_classes(
    client: InferenceClient, stream: bool, asked: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        list(client.text_generation(PROMPT, stream=stream, max_new_tokens=2, **asked))  # type: ignore[call-overload]


@pytest.mark.parametrize("who", ["alice", ""])
def test_a_chat_and_its_stream_name_the_model_as_a_field(served: tuple[str, Talker], who: str) -> None:
    client = InferenceClient(base_url=f"{served[0]}/v1", api_key="none")
    asked: dict[str, Any] = {"model": who or "tiny", "messages": SAID, "max_tokens": 6, "temperature": 0.0}
    answer = client.chat.completions.create(**asked)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens == 6
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    endpoint = InferenceClient(served[0])  # which calls every model "dummy"
    again = endpoint.chat_completion(
        SAID, max_tokens=6, temperature=0.0, extra_body={"model": asked["model"]}
    )
    assert again.choices[0].message.content == text
    with pytest.raises(HfHubHTTPError) as caught:
        endpoint.chat_completion(SAID, max_tokens=6)
    assert caught.value.response.status_code == 424 and "'dummy'" in caught.value.response.text


def test_the_asynchronous_client_streams(served: tuple[str, Talker], shared: Bundle) -> None:
    async def ask() -> list[str]:
        async with AsyncInferenceClient(served[0]) as client:
            stream = await client.text_generation(PROMPT, stream=True, max_new_tokens=6, adapter_id="bob")
            return [text async for text in stream]

    wanted = tiny.peft_text(tiny.llama(), PROMPT, shared.reconstruct("bob"), tokens=6)
    assert "".join(asyncio.run(ask())) == wanted
