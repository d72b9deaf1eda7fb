"""The gateway measured: benchmarks/results/gateway.json.

    python -m benchmarks.gateway [--only keys,overhead,attempts,fuzz,kills,overload]

A tiny model behind it, so that what is measured is the gateway. Every user's adapter makes the model say a
text of its own, in either version: an answer tells whose it is, and of which version.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
import sqlalchemy as sa

from benchmarks.gateway_stack import Stack, body, lines, stack
from benchmarks.pages import read_result
from benchmarks.record import circumstances, store
from benchmarks.schemathesis_run import Fuzz
from benchmarks.schemathesis_run import run as fuzz_run
from soppu.gateway.keys import PREFIX, KeyRow, KeyStore, digest_of
from soppu.registry import Registry
from tests.soppu.gateway.attempts import ATTEMPTS
from tests.soppu.gateway.house import house

NAME = "gateway"
_OPEN = {"log_users": "none", "limits": {"requests": "", "each_user": 64}}
_PACKAGES = ("httpx", "starlette", "uvicorn", "h11", "limits", "PyJWT", "SQLAlchemy")


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def key_lookups(folder: Path, *, count: int = 100_000, asked: int = 2000) -> dict[str, Any]:
    """Milliseconds to find a key among so many, on one thread, as each request does; and for a wrong one."""
    with closing(Registry.open(folder / "keys")) as registry:
        keys = KeyStore(registry.catalogue)
        texts = [f"{PREFIX}user_{secrets.token_urlsafe(32)}" for _ in range(count)]
        with registry.catalogue.write() as session:  # as `create` does, but all at once
            session.execute(sa.insert(KeyRow), [_row(number, text) for number, text in enumerate(texts)])
        found: dict[str, Any] = {"users": count}
        draw = random.Random(0)
        wrong = [text[:-3] + "000" for text in texts[:asked]]
        for name, chosen in (("good", draw.sample(texts, asked)), ("wrong", wrong)):
            took = []
            for text in chosen:
                began = time.perf_counter()
                key = keys.find(text)
                took.append(1000 * (time.perf_counter() - began))
                assert (key is not None) == (name == "good")
            found[name] = {"p50_ms": statistics.median(took), "p99_ms": quantile(took, 0.99)}
    return found


def _row(number: int, text: str) -> dict[str, Any]:
    return {
        "digest": digest_of(text),
        "id": f"k-{number:016x}",
        "user_id": f"user{number}",
        "note": "",
        "created_at": "2026",
        "expires_at": None,
        "revoked_at": None,
    }


def overhead(made: Stack, *, requests: int = 1500) -> dict[str, Any]:
    """Milliseconds of one-token requests straight to the server and through the gateway, in turns."""
    user, key = next(iter(made.keys.items()))
    direct = body(1) | {"parameters": {**body(1)["parameters"], "adapter_id": user}}
    headers = {"authorization": f"Bearer {key}"}
    took: dict[str, list[float]] = {"direct": [], "gateway": []}
    with httpx.Client(trust_env=False, timeout=30) as client:
        for number in range(requests + 100):
            for name, url, asked, sent in (
                ("direct", made.server_url, direct, {}),
                ("gateway", made.url, body(1), headers),
            ):
                began = time.perf_counter()
                answer = client.post(f"{url}/generate", json=asked, headers=sent)
                seconds = time.perf_counter() - began
                assert answer.status_code == 200, answer.text
                if number >= 100:
                    took[name].append(1000 * seconds)
    told = {
        name: {"p50_ms": statistics.median(each), "p99_ms": quantile(each, 0.99)}
        for name, each in took.items()
    }
    return {
        **told,
        "requests": 2 * requests,
        "overhead_ms_p50": told["gateway"]["p50_ms"] - told["direct"]["p50_ms"],
    }


def attempts(folder: Path) -> dict[str, Any]:
    """Every way in which one user may try to reach another's model, at a gateway that listens."""
    from tests.soppu.gateway.test_sockets import LIMITS, RAW, listening, said, statuses

    refused, total, reached = 0, 0, 0
    with house(folder / "attempts", limits=LIMITS) as one, listening(one) as (host, port, _):
        with httpx.Client(base_url=f"http://{host}:{port}", trust_env=False, timeout=30) as client:
            for attempt in ATTEMPTS:
                sent = [*attempt.headers, *(one.headers().items() if attempt.key else ())]
                if "content-type" not in {name.lower() for name, _ in sent}:
                    sent.append(("content-type", "application/json"))
                answer = client.request(attempt.method, attempt.path, content=attempt.content, headers=sent)
                total, refused = total + 1, refused + (answer.status_code == attempt.status)
        for due, make in RAW.values():
            told = statuses(said(port, make(one)))
            total, refused = total + 1, refused + (told == due)
        reached = len(one.upstream.heard)
    return {"attempts": total, "attempts_refused": refused, "reached_a_server": reached}


def fuzz(made: Stack, *, examples: int, seeds: int = 2) -> dict[str, Any]:
    """What schemathesis makes of the gateway's own document, with a user's key."""
    key, phases = next(iter(made.keys.values())), "examples,coverage,fuzzing"
    statuses: Counter[str] = Counter()
    bad: list[str] = []
    for seed in range(1, seeds + 1):
        told = fuzz_run(Fuzz(made.url, key, examples=examples, phases=phases, seed=seed))
        statuses.update(told["statuses"])
        bad += told["bad"]
    errors = sum(count for status, count in statuses.items() if status >= "500")
    return {
        "requests": statuses.total(),
        "server_errors": errors,
        "statuses": dict(sorted(statuses.items())),
        "bad": bad,
    }


class Judge:
    """Sorts answers by whose they are: the caller's own in one version, another's, or nobody's."""

    def __init__(self, says: Mapping[str, Mapping[str, str]]) -> None:
        self._says = says
        self._whose: dict[str, set[str]] = {}
        for texts in says.values():
            for user, text in texts.items():
                self._whose.setdefault(text, set()).add(user)
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    @property
    def distinct(self) -> int:
        """Texts that are one user's alone."""
        return sum(len(users) == 1 for users in self._whose.values())

    def judge(self, user: str, text: str, version: str = "") -> None:
        """Count one answer; `version` is the bundle it says it is of."""
        own = {bundle for bundle, texts in self._says.items() if texts[user] == text}
        if own and (not version or version in own):
            kind = "own"
        elif own:
            kind = "wrong_version"
        else:
            kind = "wrong_user" if self._whose.get(text) else "unknown_text"
        self.counts[kind] += 1
        if kind != "own" and len(self.examples) < 5:
            self.examples.append(f"{user}: {kind}: {text!r} {version[:12]}")


async def ask_once(client: httpx.AsyncClient, made: Stack, judge: Judge, draw: random.Random) -> str:
    """One request of a user drawn, whole or as a stream; how it ended."""
    user = draw.choice(list(made.keys))
    headers = {"authorization": f"Bearer {made.keys[user]}"}
    path = draw.choice(("/generate", "/generate_stream"))
    try:
        answer = await client.post(f"{made.url}{path}", json=body(), headers=headers)
        if answer.status_code != 200:
            return str(answer.status_code)
        if path == "/generate":
            text = answer.json()["generated_text"]
        else:
            events = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
            if "error" in events[-1] or events[-1].get("generated_text") is None:
                return "told broken off"
            text = events[-1]["generated_text"]
    except (httpx.HTTPError, IndexError, json.JSONDecodeError) as error:
        return type(error).__name__
    judge.judge(user, text, answer.headers.get("x-adapter-version", ""))
    return "200"


async def load(made: Stack, judge: Judge, clients: int, until: Callable[[], bool]) -> Counter[str]:
    """So many clients that each ask again as soon as they are answered."""
    ended: Counter[str] = Counter()

    async def one(seed: int) -> None:
        draw = random.Random(seed)
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as client:
            while not until():
                how = await ask_once(client, made, judge, draw)
                ended[how] += 1
                if how != "200":
                    await asyncio.sleep(0.05 if how != "429" else 0.2 * draw.random() + 0.05)

    await asyncio.gather(*(one(seed) for seed in range(clients)))
    return ended


def kills(made: Stack, *, moments: int = 20, seed: int = 7) -> dict[str, Any]:
    """SIGKILL of publisher, gateway or server at random moments of a publication to everybody, under load."""
    judge, draw, done = Judge(made.says), random.Random(seed), False
    made.publish(made.versions[1])  # what it publishes from is imported once
    began = time.monotonic()
    made.publish(made.versions[0])
    length = time.monotonic() - began
    told: Counter[str] = Counter()

    def killing() -> None:
        for number in range(moments):
            version = made.versions[number % 2 ^ 1]
            what = ("publisher", "gateway", "server")[number % 3]
            publishing = made.publisher(version)
            time.sleep(draw.random() * length)
            told[what] += publishing.is_alive() or what != "publisher"
            if what == "publisher":
                publishing.kill()
            else:
                victim = made.gateway if what == "gateway" else made.server
                victim.kill()
                victim.start()
            publishing.join()
            made.publish(version)  # what was cut off is finished by doing it again

    async def main() -> Counter[str]:
        nonlocal done
        loading = asyncio.ensure_future(load(made, judge, 8, lambda: done))
        try:
            await asyncio.to_thread(killing)
        finally:
            done = True
        return await loading

    ended = asyncio.run(main())
    return {
        "users": len(made.keys),
        "kills": dict(told),
        "publication_s": length,
        "requests": sum(ended.values()),
        "answered": ended["200"],
        "ended": dict(ended),
        **_judged(judge),
    }


def _judged(judge: Judge) -> dict[str, Any]:
    names = ("own", "wrong_user", "wrong_version", "unknown_text")
    counts = {name: judge.counts[name] for name in names}
    return {**counts, "distinct_texts": judge.distinct, "examples": judge.examples}


def overload(made: Stack, *, clients: int = 200, seconds: float = 300.0) -> dict[str, Any]:
    """More than the gateway takes, for minutes: memory, refusals, whose answers, and the recovery."""
    judge, end = Judge(made.says), time.monotonic() + seconds
    assert made.gateway.running is not None
    gateway = psutil.Process(made.gateway.running.pid)
    memory: list[tuple[float, int]] = []

    async def main() -> Counter[str]:
        loading = asyncio.ensure_future(load(made, judge, clients, lambda: time.monotonic() > end))
        while not loading.done():
            memory.append((time.monotonic(), gateway.memory_info().rss))
            await asyncio.sleep(1.0)
        return await loading

    before = gateway.memory_info().rss
    ended = asyncio.run(main())
    well = _recovery(made)
    early = [size for at, size in memory if at < end - 0.75 * seconds]
    late = [size for at, size in memory if at > end - 0.25 * seconds]
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(ended.values()),
        "ended": dict(ended),
        "memory_mib": {
            "before": before / 2**20,
            "first_quarter_max": max(early) / 2**20,
            "last_quarter_max": max(late) / 2**20,
        },
        "recovery_s": well,
        **_judged(judge),
    }


def _recovery(made: Stack) -> float:
    """Seconds from the end of the load until ten requests in a row are answered, each within a second."""
    began, good = time.monotonic(), 0
    key = next(iter(made.keys.values()))
    with httpx.Client(trust_env=False, timeout=30) as client:
        while good < 10:
            start = time.monotonic()
            answer = client.post(
                f"{made.url}/generate", json=body(), headers={"authorization": f"Bearer {key}"}
            )
            good = good + 1 if answer.status_code == 200 and time.monotonic() - start < 1 else 0
    return time.monotonic() - began


def _with_stack(part: Callable[[Stack], dict[str, Any]], *, users: int, **settings: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        limits = {**_OPEN["limits"], **settings}  # type: ignore[dict-item]
        with stack(Path(name), users=users, settings={**_OPEN, "limits": limits}) as made:
            found = part(made)
            found["faults_in_log"] = made.gateway.log.read_text().count("Traceback")
            found["log_lines"] = len(lines(made.gateway.log))
            return found


def _in_folder(part: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        return part(Path(name))


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "keys": lambda _: _in_folder(key_lookups),
    "attempts": lambda _: _in_folder(attempts),
    "overhead": lambda _: _with_stack(overhead, users=4),
    "fuzz": lambda scale: _with_stack(lambda made: fuzz(made, examples=round(400 * scale)), users=2),
    "kills": lambda scale: _with_stack(lambda made: kills(made, moments=round(20 * scale)), users=50),
    "overload": lambda scale: _with_stack(
        lambda made: overload(made, seconds=300 * scale), users=50, in_flight=16, waiting=32, each_user=4
    ),
}


def summary(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that everything comes down to, of the parts that are there."""
    loaded = [parts[name] for name in ("kills", "overload") if name in parts]
    told: dict[str, Any] = {}
    for name in ("requests", "wrong_user", "wrong_version", "unknown_text") if loaded else ():
        told[name] = sum(one[name] for one in loaded)
    if "overhead" in parts:
        told["overhead_ms_p50"] = parts["overhead"]["overhead_ms_p50"]
    if "attempts" in parts:
        told |= {name: parts["attempts"][name] for name in ("attempts", "attempts_refused")}
    if "keys" in parts:
        told["key_lookup_ms_p50"] = parts["keys"]["good"]["p50_ms"]
    return told


@click.command()
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts, by commas.")
@click.option("--scale", default=1.0, show_default=True, help="Of the longer parts; less than 1 is not kept.")
def main(only: str, scale: float) -> None:
    """Measure, and write what was measured into the result file beside the other parts."""
    for name in only.split(","):
        found = PARTS[name](scale)
        click.echo(f"{name}: {json.dumps(found, indent=1)}")
        measured = circumstances(seed=0, packages=_PACKAGES) | {"load_average": os.getloadavg()[0]}
        if scale >= 1:
            parts = {**read_result(NAME).get("parts", {}), name: {**found, "measured": measured}}
            whole = {"what": "the gateway before a server of a tiny model", **summary(parts), "parts": parts}
            click.echo(f"written: {store(NAME, whole)}")


if __name__ == "__main__":
    main()
