"""Either API's requests: read, judged by the gateway's bounds, and written anew for the server they go to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from soppu.gateway.bodies import ChatBody, Closed, CompletionBody, LoraxBody, read
from soppu.gateway.directory import Place
from soppu.gateway.naming import without_names
from soppu.gateway.reading import Json
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits
from soppu.serve.api.openai.fields import BOTH, without_harmless

_ONLY_OURS = ("ignore_eos_token", "guideline")  # fields that vLLM would pass over


@dataclass(frozen=True)
class Asked:
    """One request as it was read: what is sent on, and how much work it asks for."""

    route: str
    fields: Json
    stream: bool
    prompt_bytes: int
    texts: int
    new_tokens: int

    @property
    def most_tokens(self) -> int:
        """At most so many tokens, a byte of the prompt taken for one."""
        return self.prompt_bytes + self.texts * self.new_tokens


def read_lorax(route: str, body: Json, limits: Limits) -> Asked:
    """A body of LoRAX's. Refused: 422."""
    body = without_names(body)
    if "prompt" in body and "inputs" not in body:
        body["inputs"] = body.pop("prompt")
    fields = read(LoraxBody, body)
    parameters = fields.setdefault("parameters", {})
    stream = route == "/generate_stream" or route == "/" and bool(fields.get("stream"))
    if route != "/":
        fields.pop("stream", None)
    new = _new_tokens("parameters.max_new_tokens", parameters, limits)
    texts = _texts("parameters.best_of", parameters.get("best_of", 1), limits)
    if not fields["inputs"]:
        raise Refused(422, "`inputs` cannot be empty")
    return Asked(route, fields, stream, len(fields["inputs"].encode()), texts, new)


def read_openai(route: str, body: Json, limits: Limits) -> Asked:
    """A body of OpenAI's. Refused: 422."""
    kind: type[Closed] = ChatBody if route == BOTH[1] else CompletionBody
    fields = read(kind, without_harmless(without_names(body), route))
    if kind is ChatBody:
        prompts, size = 1, len(json.dumps(fields["messages"], ensure_ascii=False).encode())
    else:
        given = fields["prompt"]
        each = [given] if isinstance(given, str) else given
        prompts, size = len(each), sum(len(prompt.encode()) for prompt in each)
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in fields] or ["max_tokens"]
    new = max(_new_tokens(name, fields, limits) for name in names)
    each_prompt = max(fields.get("n", 1), fields.get("best_of", 1))
    texts = _texts("prompts times `n` or `best_of`", prompts * each_prompt, limits)
    return Asked(route, fields, bool(fields.get("stream")), size, texts, new)


READERS: dict[str, Callable[[str, Json, Limits], Asked]] = {
    **dict.fromkeys(("/", "/generate", "/generate_stream"), read_lorax),
    **dict.fromkeys(BOTH, read_openai),
}


def written(asked: Asked, place: Place) -> bytes:
    """The body for a server, with the name that the catalogue gives. Refused: 422, 503."""
    target, fields = place.target, dict(asked.fields)
    source = {"adapter_source": target.adapter_source} if place.asked_as and target.kind == "lorax" else {}
    if asked.route not in BOTH:
        if target.kind == "vllm":
            raise Refused(
                422, f"{asked.route} is LoRAX's, which the server of your model does not speak: use /v1"
            )
        named = {"adapter_id": place.asked_as} if place.asked_as else {}
        fields["parameters"] = {**fields["parameters"], **named, **source}
        return _bytes(fields)
    if target.kind == "vllm":
        for name in _ONLY_OURS:
            if name in fields:
                raise Refused(422, f"`{name}` is not known to the server of your model")
        if not place.asked_as and not target.base_model:
            raise Refused(503, "the base model has no name here: targets.base_model is not set", after=60)
    return _bytes({"model": place.asked_as or target.base_model, **fields, **source})


def _bytes(fields: Json) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _new_tokens(name: str, fields: Json, limits: Limits) -> int:
    key = name.rpartition(".")[2]
    new = int(fields.get(key, limits.new_tokens))
    if new > limits.new_tokens:
        raise Refused(422, f"`{name}` may be at most {limits.new_tokens}")
    if limits.tokens:
        fields[key] = new  # a budget needs a bound
    return new


def _texts(name: str, texts: int, limits: Limits) -> int:
    if texts > limits.texts:
        raise Refused(422, f"{name} may be at most {limits.texts}")
    return texts
