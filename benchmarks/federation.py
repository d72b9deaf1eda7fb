"""What federated training gives users, by mode and setting: benchmarks/results/federation.json.

    python -m benchmarks.federation [--corpus stdlib --corpus docstrings] [--arm NAME ...] [--users 12]

Every arm is a whole federation of the real server and client apps, their messages handed over in one
process; then every user's held-out text is measured with the full model. An arm that the file already has,
for the same users and settings, is not run again. Hours for all of it on two cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from flwr.app import Message
from flwr.common.serde import message_to_proto

from benchmarks import texts
from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from clients.workbench import workbench
from server.federation import Federation
from soppu import adapter as adapters
from soppu import config as configuration
from soppu import models
from soppu.config import Config
from soppu.data import load_user, tokenize
from soppu.evaluate.intervals import interval
from soppu.federation import emulator
from soppu.federation.train import cache_states, mean_loss
from soppu.registry import Registry
from tests.server.grid import InProcessGrid, identify

SETTINGS = ROOT / "benchmarks" / "federation.toml"
UNALIGNED = {"align.warmup_steps": 0, "align.round_steps": 0}
ARMS: Mapping[str, dict[str, Any]] = {
    "finetune": {},
    "fedsa": {"federation.mode": "fedsa"},
    "dual": {"federation.mode": "dual"},
    "local": {"federation.mode": "local"},
    "finetune, drop 0.5": {"plan.drop_ratio": 0.5},
    "finetune, no alignment": UNALIGNED,
    "finetune, warm-up only": {"align.round_steps": 0},
    "finetune, no proximal term": {"federation.prox_weight": 0.0},
    "finetune, products averaged": {"federation.average": "products"},
    # every layer of the whole model carries a LoRA, but for the two that no plan can give away
    "upper": {
        "plan.drop_ratio": 0.0,
        "plan.adapter_layers": 28,
        "align.warmup_steps": 0,
        "align.round_steps": 0,
    },
}


class CountingGrid(InProcessGrid):
    """Counts the bytes of messages as Flower puts them on the wire."""

    def __init__(self, users: int) -> None:
        super().__init__([{"partition-id": number} for number in range(users)])
        self.bytes_down = self.bytes_up = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As the grid below does it, one message at a time."""
        replies = []
        for message in messages:
            self.bytes_down += message_to_proto(message).ByteSize()
            for reply in super().send_and_receive([message], timeout=timeout):
                self.bytes_up += message_to_proto(reply).ByteSize()
                replies.append(reply)
            self.sent.clear()  # a study's messages are gigabytes
            self.replies.clear()
        return replies


@dataclass(frozen=True)
class Measured:
    """Held-out losses of every user with the full model, and what the federation told."""

    base: dict[str, float]
    shared: dict[str, float]
    personal: dict[str, float]
    result: dict[str, Any]
    traffic: tuple[int, int]
    seconds: float

    @property
    def served(self) -> dict[str, float]:
        """The loss of what each user's validation text chose."""
        ways = {"base": self.base, "shared": self.shared, "personal": self.personal}
        return {user: ways[what][user] for user, what in self.result["served"].items()}


def federate(config: Config, workdir: Path) -> Measured:
    """Run an arm to its end and measure it."""
    started = time.monotonic()
    workbench.cache_clear()
    grid = CountingGrid(len(config.data.users))
    Federation(config, workdir).run(grid)
    seconds = time.monotonic() - started
    result = json.loads((workdir / "result.json").read_text())
    base = models.resolve(config.base.model, cache=Path(config.base.cache))
    model, tokenizer = models.load_model(base, dtype=config.frozen_dtype), models.load_tokenizer(base)
    split = emulator.LayerPlan.from_json(result["plan"]["json"])
    plan = dataclasses.replace(split, kept=split.bottom)  # of the full model
    top, bottom = emulator.TopModel(model, plan), emulator.with_layers(model, plan.bottom)
    shared = adapters.read(workdir / result["shared"])
    registry = Registry.open(config.registry.root)
    losses: dict[str, dict[str, float]] = {"base": {}, "shared": {}, "personal": {}}
    for user, adapter_id in result["adapters"].items():
        blocks = tokenize(
            load_user(config.data, user).heldout,
            tokenizer,
            max_tokens=config.data.max_tokens,
            chat_template=config.data.chat_template,
        )
        states = cache_states(bottom, blocks, pad_id=tokenizer.pad_token_id)
        tried = {"base": None, "shared": shared, "personal": registry.get_adapter(adapter_id)}
        for name, adapter in tried.items():
            losses[name][user] = mean_loss(top, plan, states, adapter=adapter)
    return Measured(**losses, result=result, traffic=(grid.bytes_up, grid.bytes_down), seconds=seconds)


def rows(corpus: str, arm: str, found: Measured) -> list[dict[str, Any]]:
    """The rows of an arm: what its shared adapter, its users' own, and what is served come to."""
    mode = arm.partition(",")[0]
    common = {"corpus": corpus, "arm": arm, "users": len(found.base), "seconds": found.seconds}
    up, down = found.traffic
    tables = {mode: found.personal, "served": found.served}
    if mode == "finetune":
        tables = {"base": found.base, "shared": found.shared, **tables}
    return [
        common
        | {
            "mode": name,
            "mean": sum(losses.values()) / len(losses),
            "bytes_up": up,
            "bytes_down": down,
            **(client_cost(arm) if name != "base" else {"step_ratio": None, "memory_ratio": None}),
            "losses": losses,
            "rounds": [
                {key: log[key] for key in ("mode", "shared_loss", "public_loss", "emulator_loss", "seconds")}
                for log in found.result["rounds"]
            ],
            "align": found.result["align"],
            "chosen": found.result["served"],
        }
        for name, losses in tables.items()
    ]


def client_cost(arm: str) -> dict[str, float]:
    """What a client's step and memory are of a full-model LoRA client's, both measured by client_step.

    A step's states are counted as made anew: a client keeps them, so its later steps cost less.
    """
    if arm == "upper":
        return {"step_ratio": 1.0, "memory_ratio": 1.0}
    measured = read_result("client_step")
    if not measured:
        raise click.ClickException(
            "a row tells what a step costs: run `python -m benchmarks.client_step` first"
        )
    found = measured["bfloat16"]
    client = f"client beta {ARMS[arm].get('plan.drop_ratio', 0.2)}"
    full = found["memory"]["full"]["above_imports"]
    return {
        "step_ratio": 1 / found["steps"][client]["times_full"],
        "memory_ratio": found["memory"][client]["above_imports"] / full,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they win over the corpus' one shared adapter: that of the `finetune` arm, in all.

    `worst` is the loss of the user who loses most, above the shared adapter's; `interval` the 95 % interval
    of the mean gain over it, over users. Rows of a corpus without that arm stay without both.
    """
    shared = {
        row["corpus"]: row["losses"] for row in rows if row["mode"] == "shared" and row["arm"] == "finetune"
    }
    told = []
    for row in rows:
        if (held := shared.get(row["corpus"])) is None:
            told.append(row)
            continue
        gains = np.array([held[user] - loss for user, loss in row["losses"].items()])
        found = interval(gains, np.ones(len(gains)), seed=0)
        comparison = {
            "worst": float(-gains.min()),
            "gain": float(gains.mean()),
            "interval": (found.low, found.high),
            "better_than_shared": int((gains > 0).sum()),
        }
        told.append(row | comparison)
    return told


def stored() -> list[dict[str, Any]]:
    """The rows that there are."""
    rows: list[dict[str, Any]] = (read_result("federation") or {"rows": []})["rows"]
    return rows


@click.command()
@click.option("--corpus", "corpora", multiple=True, default=texts.CORPORA, type=click.Choice(texts.CORPORA))
@click.option("--arm", "arms", multiple=True, default=tuple(ARMS), type=click.Choice(tuple(ARMS)))
@click.option("--users", default=12, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(corpora: tuple[str, ...], arms: tuple[str, ...], users: int, seed: int) -> None:
    """Run the arms that are missing, one after the other, and write each down as it ends."""
    identify()
    for corpus, arm in itertools.product(corpora, arms):
        with tempfile.TemporaryDirectory() as folder:
            config = settings(corpus, arm, users=users, seed=seed, folder=folder)
            key = f"{corpus}/{arm}/{config.training_digest()}"
            if any(row["key"] == key for row in stored()):
                continue
            found = federate(config, Path(folder) / "work")
        made = [{**row, "key": key} for row in rows(corpus, arm, found)]
        # read again: another corpus may be under way beside this one
        kept = [row for row in stored() if (row["corpus"], row["arm"]) != (corpus, arm)]
        store("federation", {"rows": compared(kept + made)} | circumstances(seed=seed))
        for row in made:
            click.echo(f"{corpus:10} {arm:28} {row['mode']:9} {row['mean']:.4f}")


def settings(corpus: str, arm: str, *, users: int, seed: int, folder: str) -> Config:
    """The configuration of an arm."""
    places = {"registry.root": f"{folder}/registry", "federation.client_state": f"{folder}/clients"}
    cache = {"base.cache": str(ROOT / ".soppu" / "models")}
    told = {**texts.settings(corpus, users=users), **ARMS[arm], **places, **cache, "seed": seed}
    return configuration.load(SETTINGS, told)


if __name__ == "__main__":
    main()
