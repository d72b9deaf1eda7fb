"""`/v1/completions` and `/v1/chat/completions`: OpenAI's bodies, LoRAX's statuses, errors, headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import __version__
from soppu.errors import RequestError
from soppu.serve.api.openai import chat_template
from soppu.serve.api.openai.answers import Answer, ChatForm, CompletionForm, Form
from soppu.serve.api.openai.asked import Asked, Limits, ask_chat, ask_completion, in_words_of
from soppu.serve.api.openai.bodies import Body, ChatBody, CompletionBody, read_body
from soppu.serve.api.openai.candidates import Candidates
from soppu.serve.api.openai.models import ModelsApi
from soppu.serve.api.requests import ParsedRequest, read_json
from soppu.serve.api.responses import error_body
from soppu.serve.api.routing import Routing, told
from soppu.serve.api.streams import SIGN_OF_LIFE, data, measures, server_sent, watch
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Generation
from soppu.serve.refusals import invalid

Headers = Callable[[ParsedRequest, Generation], dict[str, str]]


class OpenAiApi:
    """OpenAI's routes. `headers` are those of `/generate`'s answers."""

    def __init__(
        self, engine: Engine, *, model_id: str, base_hash: str, headers: Headers, routing: Routing
    ) -> None:
        self._engine = engine
        self._routing = routing
        self._headers = headers
        self._base_hash = base_hash
        self._limits = Limits(model_id, engine.options.max_batch)
        self._models = ModelsApi(engine.bank, model_id=model_id, base_hash=base_hash)

    def routes(self) -> list[Route]:
        """The route table."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            *self._models.routes(),
        ]

    async def completions(self, request: Request) -> Response:
        """Go on with a prompt."""
        body = read_body(CompletionBody, await read_json(request))
        return await self._respond(
            request, body, CompletionForm(), partial(ask_completion, body, self._limits)
        )

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, by the tokenizer's chat template."""
        body = read_body(ChatBody, await read_json(request))
        if not body.messages:
            raise invalid("`messages` cannot be empty")
        prompt = await run_in_threadpool(
            chat_template.render,
            self._engine.tokenizer,
            [message.as_dict() for message in body.messages],
            guideline=body.guideline or "",
        )
        return await self._respond(request, body, ChatForm(), partial(ask_chat, body, prompt, self._limits))

    async def _respond(self, request: Request, body: Body, form: Form, ask: Callable[[], Asked]) -> Response:
        try:
            asked = ask()
            routed = await self._routing.route_all(asked.candidates, each=asked.best_of)
            asked = replace(asked, candidates=routed)
            candidates = await Candidates.submit(self._engine, asked.candidates)
        except RequestError as error:
            raise in_words_of(body, error) from None
        answer = self._answer(form, candidates, asked, body)
        headers = self._headers(asked.candidates[0], candidates.generations[0])
        headers |= told(*asked.candidates[:: asked.best_of])
        if body.stream:
            return server_sent(_events(answer, asked, candidates), headers)
        await _collect(request, candidates)
        finish = candidates.whole(asked.best_of)
        before = asked.before(asked.n)
        chosen = candidates.best(asked.best_of, asked.n)
        content = answer.whole(chosen, before=before, finish=finish)
        return JSONResponse(content, headers={**headers, **measures(finish)})

    def _answer(self, form: Form, candidates: Candidates, asked: Asked, body: Body) -> Answer:
        resolved = candidates.generations[0].job.resolved
        return Answer(
            form,
            model=resolved.adapter_id or self._limits.model_id,
            fingerprint=f"{__version__}-{(resolved.version or self._base_hash)[:12]}",
            logprobs=asked.logprobs,
            counted=bool(body.stream_options and body.stream_options.include_usage),
        )


async def _collect(request: Request, candidates: Candidates) -> None:
    """Wait until all are finished. RequestError where one fails, or the client goes away."""
    watcher = asyncio.ensure_future(watch(request, partial(candidates.put, 0)))
    try:
        async for _ in candidates.pieces():
            pass
    finally:
        watcher.cancel()
        candidates.cancel()


async def _events(answer: Answer, asked: Asked, candidates: Candidates) -> AsyncIterator[str]:
    """`data: {json}` for each event and `data: [DONE]`; an error is one event, and the last."""
    try:
        for index, before in enumerate(asked.before(asked.n)):
            if (opening := answer.opening(index, before)) is not None:
                yield data(opening)
        async for numbered in candidates.pieces():
            if numbered is None:
                yield SIGN_OF_LIFE
                continue
            for event in answer.events(*numbered):
                yield data(event)
        if answer.counted:
            yield data(answer.counts(candidates.whole(asked.best_of)))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield data(error_body(error))
    finally:
        candidates.cancel()
