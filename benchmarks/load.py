"""One client for every server: requests of many users, so many at a time, each token timed as it comes.

Written on bare sockets, since client and server share a machine: what a client library costs would be taken
from every server's throughput alike, and hide what lies between them.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WORDS = "def class return import value index table row user read write open close sort list name path".split()


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how: `api` is "openai" or "lorax"; `base` is what the base model is called there."""

    port: int
    api: str
    base: str = ""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """For clients that take one."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Ask:
    """One request. "" is the base model."""

    user: str
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Timing:
    """One answer: seconds until the first token, between tokens, and how many tokens came."""

    first: float
    gaps: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Traffic:
    """Which users ask.

    Attributes:
        users: names to draw from; none is the base model.
        zipf: popularity falls as 1 / rank instead of being equal; where it is equal nobody is drawn again
            before everybody was.
    """

    users: tuple[str, ...]
    zipf: bool = False


def asks(traffic: Traffic, *, requests: int, tokens: int, seed: int) -> list[Ask]:
    """Requests with prompts of about 32 tokens, no two alike: no server may answer from a cached prefix."""
    draw = random.Random(seed)
    users = list(traffic.users) or [""]
    if traffic.zipf:
        chosen = draw.choices(users, [1 / (place + 1) for place in range(len(users))], k=requests)
    else:
        chosen = []
        while len(chosen) < requests:
            chosen += draw.sample(users, len(users))
    prompts = (f"{draw.randrange(10**6)} " + " ".join(draw.choices(WORDS, k=26)) for _ in range(requests))
    return [Ask(user, prompt, tokens) for user, prompt in zip(chosen, prompts, strict=False)]


def measure(endpoint: Endpoint, wanted: Sequence[Ask], *, concurrency: int) -> dict[str, Any]:
    """Throughput and latencies of a closed loop with `concurrency` requests under way.

    Raises:
        RuntimeError: a request was refused, or did not get all its tokens.
    """
    began = time.perf_counter()
    timings = asyncio.run(_run(endpoint, wanted, concurrency))
    seconds = time.perf_counter() - began
    gaps = [1e3 * gap for one in timings for gap in one.gaps]
    firsts = [1e3 * one.first for one in timings]
    return {
        "tokens_per_second": sum(one.tokens for one in timings) / seconds,
        "seconds": seconds,
        "tokens": sum(one.tokens for one in timings),
        "first_token_ms": {"p50": statistics.median(firsts), "p99": _quantile(firsts, 0.99)},
        "between_tokens_ms": {"p50": statistics.median(gaps), "p99": _quantile(gaps, 0.99)},
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def _run(endpoint: Endpoint, wanted: Sequence[Ask], concurrency: int) -> list[Timing]:
    waiting, done = list(reversed(wanted)), []

    async def worker() -> None:
        while waiting:
            done.append(await _one(endpoint, waiting.pop()))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return done


async def _one(endpoint: Endpoint, ask: Ask) -> Timing:
    path, body = _openai(endpoint, ask) if endpoint.api == "openai" else _lorax(ask)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    began = time.perf_counter()
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {endpoint.host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    moments, tokens, other = [], 0, []
    async for line in reader:
        if line.startswith(b"data:") and b"[DONE]" not in line:
            found = _tokens(json.loads(line[5:]), endpoint.api)
            tokens += found
            moments += [time.perf_counter()] * bool(found)
        else:
            other.append(line)
    writer.close()
    if tokens != ask.tokens:
        told = b"".join(other)[-400:].decode(errors="replace")
        raise RuntimeError(f"{ask.user or 'base'}: {tokens} tokens of {ask.tokens}: {told}")
    gaps = tuple(after - before for before, after in zip(moments, moments[1:], strict=False))
    return Timing(moments[0] - began, gaps, tokens)


def _openai(endpoint: Endpoint, ask: Ask) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {
        "model": ask.user or endpoint.base,
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def _lorax(ask: Ask) -> tuple[str, dict[str, Any]]:
    parameters = {"adapter_id": ask.user or None, "max_new_tokens": ask.tokens, "ignore_eos_token": True}
    return "/generate_stream", {"inputs": ask.prompt, "parameters": parameters}


def _tokens(event: dict[str, Any], api: str) -> int:
    """How many tokens an event brings. RuntimeError for one that tells of a failure."""
    if "error" in event:
        raise RuntimeError(str(event)[:400])
    if api == "lorax":
        return int("token" in event)
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
