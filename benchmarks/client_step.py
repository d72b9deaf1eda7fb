"""What a step costs a FedBiOT client, beside LoRA on the full model: benchmarks/results/client_step.json.

    python -m benchmarks.client_step [--rounds 5]

Every batch goes through all variants in turn, so a busy machine slows all of them; what is counted is
processor time of one thread, and ratios are between the same batches. `full` is this library's own code over
all layers (hooks, and a head that runs only where labels count); `peft` is PEFT with transformers' own loss.
Peak memory is that of a process of each variant's own, above what it takes to import the libraries: reading,
states, steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.record import RESULTS, circumstances, store
from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import DataConfig
from soppu.data import Block, collate, load_user, tokenize
from soppu.federation import emulator
from soppu.federation.attach import attached, initial_pairs
from soppu.federation.client_part import ClientPart
from soppu.federation.head_loss import row_losses
from soppu.federation.simulation import LEAN
from soppu.federation.train import backward, cache_states, proximal
from soppu.models import BaseModel

RANK, BATCH, LAYERS, TOKENS, SEED = 8, 4, 4, 192, 0
_STEPS = 8  # that memory is measured over
USERS = ("email", "tkinter", "asyncio", "json")
Step = Callable[[Sequence[Block]], None]
VARIANTS = (
    "peft",
    "full",
    "client beta 0.2",
    "client beta 0.2, cached",
    "client beta 0.5",
    "client beta 0.5, cached",
)
_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}


def blocks_of(base: BaseModel, users: Sequence[str]) -> list[Block]:
    """What users of the built-in corpus train on."""
    tokenizer = models.load_tokenizer(base)
    data = DataConfig(max_tokens=TOKENS)
    return [b for user in users for b in tokenize(load_user(data, user).train, tokenizer, max_tokens=TOKENS)]


def trainable(shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, LoraPair], torch.optim.Optimizer]:
    pairs = initial_pairs(shapes, rank=RANK, seed=SEED)
    sides = [side.requires_grad_() for pair in pairs.values() for side in (pair.A, pair.B)]
    return pairs, torch.optim.AdamW(sides, lr=1e-4, weight_decay=0.0)


def advance(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def client(
    base: BaseModel, *, beta: float, dtype: str, cached: bool, first: Sequence[Sequence[Block]] = ()
) -> Step:
    """A client's step: states of the batch unless they are there already, then the adapter layers.

    Args:
        first: batches whose states are made before anything else.
    """
    plan = plan_of(base, beta=beta)
    part = ClientPart(base, plan, dtype=dtype, compute=_COMPUTE[dtype])
    inner = emulator_lora(base, plan)
    pairs, optimizer = trainable(emulator.target_shapes(models.skeleton(base), plan))
    own = emulator.to_own(LoraAdapter(pairs), plan, plan.adapter)
    start = {
        name: LoraPair(pair.A.detach().clone(), pair.B.detach().clone()) for name, pair in own.pairs.items()
    }
    kept: dict[int, Any] = {}

    def states(batch: Sequence[Block]) -> Any:
        with part.bottom(inner) as bottom:
            return cache_states(bottom, batch, pad_id=0)

    if first:
        with part.bottom(inner) as bottom:
            kept = {id(batch): cache_states(bottom, batch, pad_id=0) for batch in first}

    def step(batch: Sequence[Block]) -> None:
        found = kept.get(id(batch)) or states(batch)
        if cached:
            kept[id(batch)] = found
        with attached(part.top.model, own):
            optimizer.zero_grad(set_to_none=True)
            backward(part.top, found)
            (1e-3 * proximal(own.pairs, start)).backward()
            optimizer.step()

    return step


def plan_of(base: BaseModel, *, beta: float) -> emulator.LayerPlan:
    return emulator.make_plan(
        models.skeleton(base), base_hash=base.hash, adapter_layers=LAYERS, drop_ratio=beta
    )


def emulator_lora(base: BaseModel, plan: emulator.LayerPlan) -> LoraAdapter:
    shapes = emulator.target_shapes(models.skeleton(base), plan, plan.kept)
    return emulator.to_own(LoraAdapter(initial_pairs(shapes, rank=RANK, seed=SEED)), plan, plan.kept)


def full(base: BaseModel, *, dtype: str) -> Step:
    """LoRA on the same kinds of modules of every layer, with this library's hooks and its sparing head."""
    model = models.load_model(base, dtype=dtype)
    plan = plan_of(base, beta=0.0)
    pairs, optimizer = trainable(emulator.target_shapes(model, plan, range(plan.layers)))
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def step(batch: Sequence[Block]) -> None:
        ids, mask, labels = collate(batch, pad_id=0)
        with attached(model, LoraAdapter(pairs)):
            hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            target = labels[:, 1:]
            counted = target != -100
            loss = row_losses(head, hidden[:, :-1][counted], target[counted]).sum() / counted.sum()
            advance(loss, optimizer)

    return step


def by_peft(base: BaseModel, *, dtype: str) -> Step:
    """As everybody does it."""
    model = models.load_model(base, dtype=dtype)
    targets = list(plan_of(base, beta=0.0).target_modules)
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Sequence[Block]) -> None:
        ids, mask, labels = collate(batch, pad_id=0)
        advance(tuned(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss, optimizer)

    return step


def make(base: BaseModel, variant: str, *, dtype: str, first: Sequence[Sequence[Block]] = ()) -> Step:
    if variant == "peft":
        return by_peft(base, dtype=dtype)
    if variant == "full":
        return full(base, dtype=dtype)
    beta, cached = float(variant.split()[2].rstrip(",")), "cached" in variant
    return client(base, beta=beta, dtype=dtype, cached=cached, first=first)


def timed(base: BaseModel, *, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of processor a step of every variant, and how many times less than the full model's that is."""
    steps = {variant: make(base, variant, dtype=dtype) for variant in VARIANTS}
    blocks = blocks_of(base, USERS)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(blocks), generator=generator).tolist()
    batches = [[blocks[i] for i in order[at * BATCH : (at + 1) * BATCH]] for at in range(rounds)]
    for step in steps.values():
        step(batches[0])
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for batch in batches:
        for variant, step in steps.items():
            if "cached" in variant:
                step(batch)  # the states
            started = time.process_time()
            step(batch)
            seconds[variant].append(time.process_time() - started)
    rows = {}
    for variant in VARIANTS:
        rows[variant] = {"seconds": statistics.median(seconds[variant]), "runs": seconds[variant]}
        for other in ("full", "peft"):
            ratios = [a / b for a, b in zip(seconds[other], seconds[variant], strict=True)]
            rows[variant][f"times_{other}"] = statistics.median(ratios)
    return {"steps": rows, "tokens": [sum(len(block.ids) for block in batch) for batch in batches]}


def memory(base: BaseModel, variant: str, *, dtype: str) -> dict[str, int]:
    """Peak resident bytes of this process from here on: reading, one user's states, a few steps."""
    blocks = blocks_of(base, USERS[:1])
    pair, optimizer = trainable({"x": (2, 2)})
    advance((pair["x"].A * 2).sum(), optimizer)  # at the first, torch imports its compiler
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = resident("VmRSS")
    batches = [blocks[at : at + BATCH] for at in range(0, len(blocks), BATCH)]
    if variant.startswith("client"):  # as a client does: the states of all examples, then steps
        step = make(base, f"{variant}, cached", dtype=dtype, first=batches)
    else:
        step = make(base, variant, dtype=dtype)
    for batch in batches[:_STEPS]:
        step(batch)
    return {"imported": before, "peak": resident("VmHWM"), "above_imports": resident("VmHWM") - before}


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def apart(variant: str, dtype: str, cache: str) -> dict[str, int]:
    """`memory` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.client_step", "--memory", variant, "--dtype", dtype]
    words += ["--cache", cache]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@click.command()
@click.option("--rounds", default=9, help="Batches.")
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"))
@click.option("--memory", "variant", default="", help="Only the peak memory of this variant, here.")
@click.option("--cache", default=".soppu/models")
def main(rounds: int, dtypes: tuple[str, ...], variant: str, cache: str) -> None:
    if not LEAN.items() <= os.environ.items():  # as in a simulation; torch reads them when it is loaded
        words = [sys.executable, "-m", "benchmarks.client_step", *sys.argv[1:]]
        os.execve(sys.executable, words, {**os.environ, **LEAN})
    torch.set_num_threads(1)
    base = models.resolve("smollm2-135m", cache=Path(cache))
    if variant:
        print(json.dumps(memory(base, variant, dtype=dtypes[0])))
        return
    path = RESULTS / "client_step.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    weights = sum(p.numel() for p in models.skeleton(base).parameters())
    for dtype in dtypes:
        each = 4 if dtype == "float32" else 2
        peaks = {name: apart(name, dtype, cache) for name in VARIANTS if "cached" not in name}
        found[dtype] = {
            "circumstances": circumstances(seed=SEED),
            "load": os.getloadavg()[0],  # of a shared machine, as it began
            **timed(base, dtype=dtype, rounds=rounds),
            "full_weights_bytes": weights * each,
            "memory": {
                name: {**row, "of_full_weights": row["above_imports"] / (weights * each)}
                for name, row in peaks.items()
            },
        }
        store("client_step", found)  # after each: they can be run one by one


if __name__ == "__main__":
    main()
