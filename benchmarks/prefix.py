"""What shared prompts save, and what memory requests take: benchmarks/results/prefix.json.

    python -m benchmarks.prefix [--users 64]

The embedded engine in this process, float32. Every user of a bundle of the pipeline's shape (q, v, o and
down of the last four layers, k = 16) asks with a prompt that begins with the same 512 tokens and ends with a
line of their own; an engine that shares prompts takes turns with one that does not. `ttft_ratio` is the
median time to the first token without over that with, of all users but the first, who finds nobody's work;
`ttft_processor_ratio` is that of processor seconds, which other processes on the machine do not stretch;
`again` is the same where users ask a second time. Then, in an engine of its own, one long request and fifteen
short ones at once: the bytes of their tokens' keys and values, what the process grew by, and what it keeps.
"""

from __future__ import annotations

import gc
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import served
from benchmarks.engine import BUNDLE_ID
from benchmarks.record import circumstances, store
from soppu import corpus
from soppu.compress import Bundle
from soppu.compress.numbers.quantise import AXIS
from soppu.models import load_model, load_tokenizer
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import Event, Generation, GenerationRequest
from tests.soppu.compress.handmade import Plan, make

COMMON, NEW_TOKENS = 512, 12
LONG, SHORT, SHORTS = (1000, 60), (20, 44), 15  # tokens of a prompt and of its answer
SHAPES = {
    f"model.layers.{layer}.{leaf}": shape
    for layer in range(26, 30)
    for leaf, shape in {
        "self_attn.q_proj": (576, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.down_proj": (576, 1536),
    }.items()
}


def bundle(users: int) -> Bundle:
    """Random cores in one basis a module, strong enough to change a text."""
    forms = [[(AXIS, 0, 8, 0)] * served.RANK] * users
    made = make(Plan(forms, SHAPES, k=(served.RANK, served.RANK), widths=(8, 8)), seed=0)
    found = served.base()
    return replace(
        made, norm=6 * torch.ones(users) / served.RANK, base_hash=found.hash, base_model=found.name
    )


def prompts(tokenizer: PreTrainedTokenizerBase, users: int) -> list[str]:
    """Prompts that begin with the same tokens, about COMMON, and end with a function's head each."""
    functions = corpus.functions("email")
    text = "".join(prompt + body for prompt, body in functions[: users + 200])
    begin = tokenizer.decode(tokenizer(text)["input_ids"][:COMMON])
    return [f"{begin}\n\n# {number}\n{functions[number][0][:40]}" for number in range(users)]


def bank_of(model: PreTrainedModel, made: Bundle) -> AdapterBank:
    """A bank that serves the bundle's users."""
    bank = AdapterBank(model, base_hash=made.base_hash)
    bank.stage(made, bundle_id=BUNDLE_ID)
    bank.activate(BUNDLE_ID)
    return bank


def first_token(engine: Engine, prompt: str, user: str) -> tuple[float, float, str]:
    """Seconds to the first token, processor seconds meanwhile, and the text."""
    begun, processor, ended = time.perf_counter(), time.process_time(), threading.Event()
    times: list[tuple[float, float]] = []
    texts: list[str] = []

    def hear(event: Event) -> None:
        times.append((time.perf_counter() - begun, time.process_time() - processor))
        finish = getattr(event, "finish", None)
        if isinstance(event, Exception) or finish:
            texts.append(finish.text if finish else str(event))
            ended.set()

    engine.submit(GenerationRequest(prompt, user, max_new_tokens=NEW_TOKENS, ignore_eos=True), sink=hear)
    ended.wait()
    return *times[0], texts[0]


def turns(engines: dict[str, Engine], asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Every user asks both engines, the order changing from user to user."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[str]] = {name: [] for name in engines}
    for number, (prompt, user) in enumerate(asked):
        names = list(engines)
        for name in names if number % 2 else reversed(names):
            wall, used, text = first_token(engines[name], prompt, user)
            seconds[name].append(wall)
            processor[name].append(used)
            texts[name].append(text)
    wall_, used_ = (
        {name: statistics.median(taken[1:]) for name, taken in kind.items()} for kind in (seconds, processor)
    )
    return {
        "ttft_seconds": wall_,
        "ttft_ratio": wall_["without"] / wall_["with"],
        "ttft_processor_seconds": used_,
        "ttft_processor_ratio": used_["without"] / used_["with"],
        "texts": len(asked),
        "texts_equal": sum(map(str.__eq__, texts["with"], texts["without"])),
        "different_texts": len(set(texts["with"])),
        "seconds": seconds,
    }


def memory(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One long request and fifteen short ones at once, after the same has been run once."""
    text = "".join(prompt + body for prompt, body in corpus.functions("email"))
    ids = tokenizer(text)["input_ids"]
    process, peak = psutil.Process(), [0]
    for begin in (4000, 0):  # the first time, with other texts, is for what torch itself keeps
        asked = [(tokenizer.decode(ids[begin : begin + LONG[0]]), LONG[1])]
        for number in range(SHORTS):
            start = begin + 1200 + 50 * number
            asked.append((tokenizer.decode(ids[start : start + SHORT[0]]), SHORT[1]))
        gc.collect()
        before, kept = process.memory_info().rss, engine.cache.pages.idle
        told = [
            engine.submit(GenerationRequest(prompt, "", max_new_tokens=new, ignore_eos=True))
            for prompt, new in asked
        ]
        peak[0] = before
        while not all(one.done for one in told):
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.01)
        tokens = sum(len(one.ids) for one in told)
        _settle(engine, told)
    sizes = engine.cache.sizes
    needed = tokens * sizes.token_bytes
    pages, grown = engine.cache.pages, peak[0] - before
    return {
        "tokens": tokens,
        "bytes_needed": needed,
        "bytes_grown": grown,
        "grown_to_needed": grown / needed,
        "bytes_after": process.memory_info().rss - before,
        "bytes_kept_for_later": (pages.idle - kept) * pages.blocks.block_bytes,
    }


def _settle(engine: Engine, told: Sequence[Generation]) -> None:
    for one in told:
        one.result()
    while engine.cache.pages.used:
        time.sleep(0.01)


@click.command()
@click.option("--users", default=64, show_default=True, help="Who ask with prompts that begin alike.")
def main(users: int) -> None:
    """Measure, and write the result file."""
    base, made = served.base(), bundle(users)
    model, tokenizer = load_model(base), load_tokenizer(base)
    bank = bank_of(model, made)

    def engine_with(prefix: int) -> Engine:
        return Engine(model, tokenizer, bank, EngineOptions(prefix_tokens=prefix))

    asked = list(zip(prompts(tokenizer, users), made.users, strict=True))
    with engine_with(EngineOptions.prefix_tokens) as sharing, engine_with(0) as alone:
        engines = {"with": sharing, "without": alone}
        first_token(alone, "a", "")  # what torch makes at its first forward
        first_token(sharing, "a", made.users[0])  # from here on it is known where users begin
        found = turns(engines, asked)
        again = turns(engines, asked[: max(2, users // 8)])
        common = min(len(tokenizer(prompt)["input_ids"]) for prompt, _ in asked)
        counts = {"asked": dict(sharing.cache.asked), "found": dict(sharing.cache.reused)}
    click.echo(json.dumps({k: v for k, v in found.items() if k != "seconds"}, indent=1))
    rows = {}
    for name, kept in {"no prompts kept": 0, "prompts kept": EngineOptions.prefix_tokens}.items():
        with engine_with(kept) as engine:
            rows[name] = memory(engine, tokenizer)
        click.echo(json.dumps({name: rows[name]}, indent=1))
    what = {
        "what": f"{users} users, prompts of {common} tokens and more that begin with the same {COMMON}",
        "model": base.name,
        "threads": torch.get_num_threads(),
        **found,
        "texts_equal": found["texts_equal"] == found["texts"],
        "again": {key: value for key, value in again.items() if key != "seconds"},
        "prompt_tokens": counts,
        "memory": {"one long and fifteen short": rows},
    }
    click.echo(f"written: {store('prefix', circumstances(seed=0) | what)}")


if __name__ == "__main__":
    main()
