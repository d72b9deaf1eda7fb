"""How fast the embedded engine is, base and 1,000 users side by side: benchmarks/results/engine.json.

    python -m benchmarks.engine [--users 1000] [--rounds 3]

16 requests at once, prompts of about 32 tokens, 64 new tokens each, in the process of the engine: tokens per
second, time to the first token, and time between tokens. The base model alone takes turns with 16 different
users of one bundle of 1,000 (`served`: q and v of every layer, k = 16), in float32 and bfloat16. Figures are
medians of the rounds. Processor seconds stand beside the wall clock's, since other processes on the machine
stretch the latter only.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch

from benchmarks import served
from benchmarks.record import circumstances, store
from soppu.compress import Bundle
from soppu.models import BaseModel, load_model, load_tokenizer
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import Event, GenerationRequest, TokenEvent

DTYPES = ("float32", "bfloat16")
CONCURRENT, NEW_TOKENS, PROMPT_WORDS = 16, 64, 28
BUNDLE_ID = "1" * 64


@dataclass
class Client:
    """One request, and when its tokens came."""

    begun: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        """The sink of a generation."""
        self.times.append(time.perf_counter())
        if not isinstance(event, TokenEvent) or event.finish is not None:
            self.ended.set()


def started(base: BaseModel, dtype: str, made: Bundle) -> Engine:
    """An engine that serves the bundle's users; it stays until the process ends."""
    model = load_model(base, dtype=dtype)
    bank = AdapterBank(model, base_hash=made.base_hash)
    bank.stage(made, bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    engine = Engine(model, load_tokenizer(base), bank, EngineOptions(max_batch=CONCURRENT))
    engine.start()
    return engine


def once(engine: Engine, who: Sequence[str]) -> dict[str, float]:
    """One request of each of `who`, all at once."""
    clients = []
    begun, processor = time.perf_counter(), time.process_time()
    for number, user in enumerate(who):
        prompt = " ".join(["word"] * PROMPT_WORDS + [str(number)])
        clients.append(Client())
        request = GenerationRequest(prompt, user, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.submit(request, sink=clients[-1])
    for client in clients:
        client.ended.wait()
    wall, processor = time.perf_counter() - begun, time.process_time() - processor
    gaps = [b - a for client in clients for a, b in zip(client.times, client.times[1:], strict=False)]
    tokens = sum(len(client.times) for client in clients)
    if tokens != len(clients) * NEW_TOKENS:
        raise click.ClickException(f"{tokens} tokens came, not {len(clients) * NEW_TOKENS}")
    return {
        "tokens_per_second": tokens / wall,
        "tokens_per_processor_second": tokens / processor,
        "first_token_seconds": statistics.median(client.times[0] - client.begun for client in clients),
        "gap_p50_seconds": statistics.median(gaps),
        "gap_p99_seconds": statistics.quantiles(gaps, n=100)[98],
    }


def measure(engine: Engine, users: Sequence[str], rounds: int) -> dict[str, Any]:
    """Base and users take turns; medians, and every run."""
    kinds = {"base": [""] * CONCURRENT, "users": list(users)}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, who in kinds.items():
            run = once(engine, who)
            if number:  # the first one warms up
                runs[kind].append(run)
    found: dict[str, Any] = {
        kind: {key: statistics.median(run[key] for run in made) for key in made[0]}
        for kind, made in runs.items()
    }
    for key in ("tokens_per_second", "tokens_per_processor_second"):
        ratios = [u[key] / b[key] for u, b in zip(runs["users"], runs["base"], strict=True)]
        found[f"users_of_base_{key}"] = statistics.median(ratios)
    return found | {"runs": runs}


@click.command()
@click.option("--users", default=1000, show_default=True, help="In the bundle.")
@click.option("--rounds", default=3, show_default=True, help="Of base and users in turn.")
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES, help="Default: both.")
def main(users: int, rounds: int, dtypes: tuple[str, ...]) -> None:
    """Measure, and write the result file."""
    base, made = served.base(), served.bundle(users)
    asked = made.users[:: len(made.users) // CONCURRENT][:CONCURRENT]
    found = {}
    for dtype in dtypes:
        engine = started(base, dtype, made)
        found[dtype] = measure(engine, asked, rounds)
        engine.close()
        told = {key: row for key, row in found[dtype].items() if key != "runs"}
        click.echo(json.dumps({dtype: told}, indent=1))
    what = {
        "what": f"{CONCURRENT} requests at once, {NEW_TOKENS} new tokens each, in process",
        "model": base.name,
        "threads": torch.get_num_threads(),
        "bundle": {"users": users, "modules": len(made.shapes), "k": served.RANK},
    }
    click.echo(f"written: {store('engine', circumstances(seed=0) | what | found)}")


if __name__ == "__main__":
    main()
