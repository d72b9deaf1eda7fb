"""The Flower ServerApp: builds the emulator, aligns it, runs the rounds, stores every user's adapter.

This is the federation's server. The HTTP server that answers prompts is `soppu.serve`.

Run configuration: `config`, a frozen SOPPU configuration (TOML), and `workdir`, where checkpoints,
`progress.json` and at last `result.json` are written. A second attempt goes on after the last finished
round.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from server import checkpoint as checkpoints
from server.agreement import Agreement
from server.checkpoint import Checkpoint, write_progress
from server.strategy import FedBiOT
from soppu import config as configuration
from soppu import data, files, models
from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.errors import FederationError, RegistryError
from soppu.federation import emulator, wire
from soppu.federation.align import Aligner
from soppu.federation.attach import initial_pairs
from soppu.registry import Registry, check_user_id

# What a client needs to know; where the registry is and what is served is not its business.
CLIENT_SECTIONS = ("seed", "frozen_dtype", "base", "data", "plan", "lora", "federation")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point Flower calls."""
    config = configuration.load(str(context.run_config["config"]))
    Federation(config, Path(str(context.run_config["workdir"]))).run(grid)


class Federation:
    """One federated run: model, plan, aligner, checkpoint, and the strategy that uses them."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config = config
        self.workdir = workdir
        self.last_round = config.federation.rounds + 1
        base = models.resolve(config.base.model, cache=Path(config.base.cache))
        model = models.load_model(base, dtype=config.frozen_dtype)
        tokenizer = models.load_tokenizer(base)
        self.plan = emulator.make_plan(
            model,
            base_hash=base.hash,
            adapter_layers=config.plan.adapter_layers,
            drop_ratio=config.plan.drop_ratio,
            target_modules=config.lora.target_modules,
        )
        self.agreement = Agreement(
            plan_hash=self.plan.hash,
            shapes=emulator.target_shapes(model, self.plan),
            rank=config.lora.rank,
            base_model=config.base.model,
            base_hash=base.hash,
            fan_in_fan_out=self.plan.fan_in_fan_out,
            form=config.federation.wire,
            max_loss=config.federation.wire_max_loss,
        )
        self.aligner = Aligner(
            model, self.plan, options=config.align, pad_id=tokenizer.pad_token_id, seed=config.seed
        )
        self._public = data.tokenize(
            data.load_public(config.align.source, limit=config.align.examples),
            tokenizer,
            max_tokens=config.align.max_tokens,
        )
        self.state = checkpoints.load(workdir, key=f"{config.training_digest()} {self.plan.hash}")
        self.registry = Registry.open(config.registry.root, catalogue=config.registry.catalogue)
        self.adapters: dict[str, str] = {}

    def run(self, grid: Grid) -> None:
        """All of it: hello, warm-up, rounds, result."""
        self.progress("asking who is there", 0)
        settings = configuration.to_dict(self.config)
        told = {name: settings[name] for name in CLIENT_SECTIONS}
        order = ConfigRecord({"settings": json.dumps(told), "plan": self.plan.to_json()})
        nodes, silent = self.hello(grid, order)
        self.warm_up()
        done = max(self.state.done, 0)
        strategy = FedBiOT(
            self.agreement,
            nodes,
            emulator=self.emulator_for_round,
            keep=self.keep,
            first_round=done,
            last_round=self.last_round,
        )
        self.strategy = strategy
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(wire.split_state(self.state.tensors)[0]),
            num_rounds=self.last_round - done,
            timeout=self.config.federation.timeout_s,
            train_config=order,
        )
        self.finish(strategy, silent)

    def hello(self, grid: Grid, order: ConfigRecord) -> tuple[dict[int, str], dict[str, str]]:
        """Ask every node who it is. FederationError if fewer than `federation.min_users` can train."""
        wanted = max(1, len(self.config.data.users))
        nodes = _wait_for_nodes(grid, wanted, timeout=self.config.federation.timeout_s)
        messages = [
            Message(content=RecordDict({"config": order}), message_type="query.hello", dst_node_id=node)
            for node in nodes
        ]
        known: dict[int, str] = {}
        refused: dict[str, str] = {}
        for reply in grid.send_and_receive(messages, timeout=self.config.federation.timeout_s):
            node = reply.metadata.src_node_id
            if reply.has_error():
                refused[f"node {node}"] = str(reply.error.reason)
                continue
            said = reply.content.config_records["hello"]
            user = str(said["user"])
            if said["plan-hash"] != self.plan.hash:
                refused[user] = "holds another layer plan"
            elif fault := _name_fault(user, known):
                refused[f"node {node}"] = fault
            else:
                known[node] = user
        if len(known) < max(1, self.config.federation.min_users):
            raise FederationError(
                f"{len(known)} users can train, federation.min_users is {self.config.federation.min_users};"
                f" refused: {refused or 'nobody'}"
            )
        return known, refused

    def warm_up(self) -> None:
        """Align the emulator before the first round, or take it over from a checkpoint."""
        self.aligner.observe(self._public)
        if self.state.done >= 0:
            emulator_state = wire.split_state(self.state.tensors)[1]
            self.aligner.load(wire.loose_from_state(emulator_state, base_hash=self.plan.base_hash))
            return
        before = dataclasses.asdict(self.aligner.measure())
        steps = self.config.align.warmup_steps
        for number, loss in enumerate(self.aligner.steps(steps), start=1):
            self.progress(f"aligning the emulator, l2 {loss.l2:.3f} kl {loss.kl:.3f}", number / (4 * steps))
        after = dataclasses.asdict(self.aligner.measure())
        pairs = initial_pairs(self.agreement.shapes, rank=self.config.lora.rank, seed=self.config.seed)
        self.remember(
            0, wire.to_state(LoraAdapter(pairs)), align={"before": before, "after": after}, rounds=[]
        )

    def emulator_for_round(self, number: int, arrays: ArrayRecord) -> dict[str, Tensor]:
        """Checkpoint what the rounds before gave, re-align, and hand out the emulator's LoRA."""
        shared = arrays.to_torch_state_dict()
        if number - 1 > self.state.done:
            rounds = self.state.notes["rounds"] + [dataclasses.asdict(self.strategy.logs[-2])]
            self.remember(number - 1, shared, rounds=rounds)
        self.progress(f"round {number} of {self.last_round}", 0.25 + 0.75 * (number - 1) / self.last_round)
        if number > 1 and self.config.align.round_steps:
            current = self.agreement.adapter(shared, who="shared adapter")
            for _ in self.aligner.steps(self.config.align.round_steps, user_adapter=current):
                pass
        return wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR)

    def keep(self, user: str, adapter: LoraAdapter, metrics: MetricRecord) -> None:
        """Store one user's own adapter."""
        values = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        run = self.workdir.resolve().name
        self.adapters[user] = self.registry.put_adapter(adapter, user=user, run=run, metrics=values)

    def remember(self, done: int, shared: Mapping[str, Tensor], **notes: Any) -> None:
        """Checkpoint after a round."""
        tensors = {**shared, **wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR)}
        self.state = Checkpoint(self.state.key, done, tensors, {**self.state.notes, **notes})
        checkpoints.store(self.workdir, self.state)

    def finish(self, strategy: FedBiOT, silent: Mapping[str, str]) -> None:
        """Write result.json, last of all: its presence says that the run is whole."""
        least = self.config.federation.min_users
        if lost := (strategy.logs[-1].lost if not least else []):
            why = [strategy.logs[-1].refused[user] for user in lost]
            raise FederationError(f"{len(lost)} users sent no adapter: {'; '.join(why)}")
        if len(self.adapters) < max(1, least):
            raise FederationError(
                f"{len(self.adapters)} adapters came back, federation.min_users is"
                f" {self.config.federation.min_users}: {strategy.logs[-1].refused}"
            )
        rounds = self.state.notes["rounds"] + [dataclasses.asdict(strategy.logs[-1])]
        result = {
            "adapters": self.adapters,
            "plan": {
                "kept": list(self.plan.kept),
                "adapter_layers": list(self.plan.adapter),
                "hash": self.plan.hash,
                "json": self.plan.to_json(),
            },
            "align": self.state.notes["align"],
            "rounds": rounds,
            "refused": {**silent, **strategy.logs[-1].refused},
        }
        self.progress("done", 1.0)
        files.write_text(self.workdir / "result.json", json.dumps(result, indent=2))

    def progress(self, note: str, share: float) -> None:
        """Tell the folder how far we are; `share` runs from 0 to 1."""
        write_progress(self.workdir, {"note": note, "share": min(1.0, share)})


def _name_fault(user: str, known: Mapping[int, str]) -> str:
    """Why a node cannot go by this name, or "": adapters are stored under it, one a user."""
    try:
        check_user_id(user)
    except RegistryError as error:
        return str(error)
    return f"says it is user {user!r}, and so does another node" if user in known.values() else ""


def _wait_for_nodes(grid: Grid, wanted: int, *, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise FederationError(f"{len(nodes)} of {wanted} nodes came within {timeout:.0f} s")
        time.sleep(0.5)
    return sorted(nodes)
