"""One federated run: builds the emulator, aligns it, runs the rounds, stores every user's adapter.

In the work folder are checkpoints, `progress.json` and at last `result.json`. A second attempt goes on after
the last finished round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from server import checkpoint as checkpoints
from server.agreement import BASE_LOSS, LOSS, SHARED_LOSS, Agreement
from server.checkpoint import WARM_UP, Checkpoint, RoundShare, write_progress
from server.evaluation import Evaluation
from server.patience import is_over
from server.roll import Roll
from server.strategy import PERSONAL, FedBiOT, RoundLog
from soppu import adapter as adapters
from soppu import config as configuration
from soppu import data, files, models
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.config import Config
from soppu.cores.core import CoreAdapter
from soppu.devices import torch_device
from soppu.errors import FederationError
from soppu.federation import emulator, privacy, wire
from soppu.federation.align import Aligner
from soppu.federation.modes import Sharing
from soppu.federation.personalise import served
from soppu.registry import Registry
from soppu.sharing import of_the_form

SHARED_FOLDER = "shared"  # in the work folder: the adapter that all users averaged
# What a client needs to know; the registry, what is served and who else there is are not its business.
CLIENT_SECTIONS = ("seed", "frozen_dtype", "compute_dtype", "base", "data", "plan", "lora", "federation")
_OURS = {
    "base": ("cache",),
    "data": ("source", "users"),
    "federation": ("client_state", "members", "connection"),
}


class Federation:
    """One federated run: model, plan, aligner, checkpoint, and the strategy that uses them.

    Args:
        members: node id -> user, of the machines that users' text is on; None simulates the users here.
    """

    def __init__(self, config: Config, workdir: Path, *, members: Mapping[int, str] | None = None) -> None:
        privacy.require(config.federation)
        self.config = config
        self.workdir = workdir
        self.members = members
        self.sharing = Sharing.of(config)
        base = models.resolve(config.base.model, cache=Path(config.base.cache))
        device = torch_device(config.align.device, key="align.device")
        model = models.load_model(base, dtype=config.frozen_dtype, device=device)
        tokenizer = models.load_tokenizer(base)
        self.plan = emulator.configured_plan(config, model, base_hash=base.hash)
        self.agreement = Agreement(
            plan_hash=self.plan.hash,
            shapes=emulator.target_shapes(model, self.plan),
            rank=config.lora.rank,
            base_model=config.base.model,
            base_hash=base.hash,
            fan_in_fan_out=self.plan.fan_in_fan_out,
            form=config.federation.wire,
            max_loss=config.federation.wire_max_loss,
            max_examples=config.data.train_examples,
            max_update=config.federation.max_update,
            sharing=self.sharing,
        )
        self.aligner = Aligner(
            model,
            self.plan,
            options=config.align,
            pad_id=tokenizer.pad_token_id,
            seed=config.seed,
            compute=models.computing(config.compute_dtype, config.frozen_dtype),
            nf4=config.frozen_dtype == "nf4",
        )
        public = data.load_public(config.align.source, limit=config.align.examples, config=config.data)
        self._public, self._unseen = (
            data.tokenize(
                part,
                tokenizer,
                max_tokens=config.align.max_tokens,
                chat_template=config.data.chat_template,
            )
            for part in data.split_public(public)
        )
        self.state = checkpoints.load(workdir, key=f"{config.training_digest()} {self.plan.hash}")
        self.registry = Registry.open(config.registry.root, catalogue=config.registry.catalogue)
        self.adapters: dict[str, str] = {}
        self.served: dict[str, str] = {}
        self.at: RoundShare | None = None  # the round that users are at
        self.span = 0.0, 1.0  # of the whole run: the part that shares are told of

    def run(self, grid: Grid) -> None:
        """All of it: hello, warm-up, rounds, result."""
        self.rounds(grid)
        self.finish()

    def rounds(self, grid: Grid) -> None:
        """As far as the personal round, and with it."""
        self.progress("asking who is there", 0)
        order = self.order()
        self.hello(grid, order)
        self.warm_up()
        self.strategy = FedBiOT(
            dataclasses.replace(self.agreement, examples=self.roll.examples),
            self.roll.nodes,
            emulator=self.emulator_for_round,
            keep=self.keep,
            sharing=self.config.federation,
        )
        shared = ArrayRecord(self.state.tensors)
        while not self.strategy.logs or self.strategy.logs[-1].mode != PERSONAL:
            shared = self.round(grid, shared, order)

    def round(self, grid: Grid, shared: ArrayRecord, order: ConfigRecord) -> ArrayRecord:
        """The next round, the personal one where sharing is over. Gives the shared adapter after it."""
        number, rounds = max(self.state.done, 0) + 1, self.state.notes["rounds"]
        most = self.sharing.shared_rounds(self.config.federation.rounds)
        if number > most or is_over(rounds, self.config.federation.patience):
            self.strategy.last_round = number
        self.strategy.first_round = number - 1
        timeout = min(self.config.federation.round_timeout_s, self.config.federation.timeout_s)
        result = self.strategy.start(grid, shared, num_rounds=1, timeout=timeout, train_config=order)
        log, at, self.at = self.strategy.logs[-1], self.at, None
        if log.refused and at:
            self.progress(f"round {number} is over", at.share(1.0), warning="; ".join(log.refused.values()))
        if log.mode == PERSONAL:
            self.shared = self.agreement.shared(shared.to_torch_state_dict(), who="shared adapter")
            return shared
        self.enough(log)
        shared = result.arrays or shared
        state = shared.to_torch_state_dict()
        log.public_loss = self.aligner.public_loss(self.agreement.shared(state, who="shared adapter"))
        self.remember(number, state, rounds=[*rounds, dataclasses.asdict(log)])
        return shared

    def order(self) -> ConfigRecord:
        """What a client is told with every message: settings and plan."""
        run = hashlib.sha256(self.state.key.encode()).hexdigest()[:16]
        return ConfigRecord({"settings": json.dumps(self.told()), "plan": self.plan.to_json(), "run": run})

    def told(self) -> dict[str, Any]:
        """The settings that clients get. A node on another machine has its own text and its own paths, and is
        told none of ours; a simulated one is on this machine and reads what we read.
        """
        settings = configuration.to_dict(self.config)
        told = {name: settings[name] for name in CLIENT_SECTIONS}
        told["federation"] = of_the_form(told["federation"])
        simulated = self.members is None
        ours = {"data": ("users",)} if simulated else _OURS
        for section, names in ours.items():
            told[section] = {key: value for key, value in told[section].items() if key not in names}
        if not simulated and Path(self.config.base.model).is_absolute():
            told["base"].pop("model")
        return told

    def hello(self, grid: Grid, order: ConfigRecord) -> None:
        """Ask every node who it is. FederationError if fewer than `federation.min_users` can train."""
        self.roll = Roll(
            grid,
            order,
            plan_hash=self.plan.hash,
            users=self.config.data.users or tuple((self.members or {}).values()),
            most_examples=self.config.data.train_examples,
            members=self.members,
            simulated=self.members is None,
        )
        self.roll.gather(limit=self.patience_s)
        self.roll.check(self.config.federation.min_users)

    @property
    def patience_s(self) -> float:
        """How long one question after who is there may take."""
        return min(self.config.federation.hello_timeout_s, self.config.federation.timeout_s)

    def warm_up(self) -> None:
        """Align the emulator before the first round, or take it over from a checkpoint."""
        self.aligner.observe(self._public, self._unseen)
        if self.state.done >= 0:
            self.aligner.load(self.state.aligner)
            return
        before = dataclasses.asdict(self.aligner.measure())
        steps = self.config.align.warmup_steps
        for number, loss in enumerate(self.aligner.steps(steps), start=1):
            self.progress(
                f"aligning the emulator, l2 {loss.l2:.3f} kl {loss.kl:.3f}", WARM_UP * number / steps
            )
        after = dataclasses.asdict(self.aligner.measure())
        self.begin({"before": before, "after": after})

    def begin(self, align: Mapping[str, Any]) -> None:
        """Checkpoint of a run whose emulator is aligned."""
        shared, _ = self.sharing.start(self.agreement.shapes)
        self.remember(0, shared, align=align, rounds=[])

    def emulator_for_round(self, number: int, arrays: ArrayRecord) -> dict[str, Tensor]:
        """See who has joined, re-align, hand out the emulator's LoRA."""
        shared = arrays.to_torch_state_dict()
        if self.config.federation.noisy_users and (
            number != self.strategy.last_round or self.sharing.trains_alone
        ):
            # before it is: a round that is run again after a kill has given something away twice
            self.remember(self.state.done, shared, releases=self.state.notes.get("releases", 0) + 1)
        self.roll.ask_again(limit=self.patience_s)
        without = f", without {', '.join(absent)}" if (absent := self.roll.absent()) else ""
        last = self.strategy.last_round or self.config.federation.rounds + 1
        self.at = RoundShare.of(number, last, self.config.federation)
        self.progress(f"round {number} of {last}{without}", self.at.share(0.0))
        if number > 1 and self.config.align.round_steps:
            current = self.agreement.shared(shared, who="shared adapter")
            for _ in self.aligner.steps(self.config.align.round_steps, user_adapter=current):
                pass
        return wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR)

    def measure(self, grid: Grid) -> None:
        """The other task: every user's losses on the user's own node, on the emulator they were trained on.

        `order.json` in the work folder names the federation's folder, users' adapters and the bundle.
        """
        asked = json.loads((self.workdir / "order.json").read_text())
        if asked["federation"]:
            self.state = checkpoints.load(Path(asked["federation"]), key=self.state.key)
        self.warm_up()
        common = {"shared": adapters.read(Path(asked["shared"]))} if asked["shared"] else {}
        bundle = Bundle.load(self.registry.bundle_path(asked["bundle"]), expected_hash=asked["bundle"])

        def sent(user: str) -> dict[str, LoraAdapter]:
            own = {"personal": self.registry.get_adapter(asked["adapters"][user])}
            kept = {"compressed": bundle.reconstruct(user)} if user in asked["compressed"] else {}
            return {**common, **own, **kept}

        evaluation = Evaluation(
            {node: user for node, user in (self.members or {}).items() if user in asked["adapters"]},
            sent,
            emulator=wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR),
            order=self.order(),
            most_examples=self.config.data.heldout_examples,
            timeout_s=self.config.federation.timeout_s,
        )
        found = evaluation.run(grid)
        self.progress("done", 1.0)
        files.write_text(self.workdir / "result.json", json.dumps(found, indent=2))

    def enough(self, log: RoundLog) -> None:
        """A mean of a few is not everybody's. FederationError if too many were lost: the next attempt repeats
        the round, because there is no checkpoint of it.
        """
        asked = len(log.accepted) + len(log.lost)
        least = self.config.federation.min_users or (asked + 1) // 2
        if len(log.accepted) < least:
            why = "; ".join(log.refused.values())
            raise FederationError(
                f"round {log.round}: {len(log.accepted)} of {asked} users answered,"
                f" at least {least} have to: {why}"
            )

    def keep(self, user: str, adapter: LoraAdapter | CoreAdapter, metrics: MetricRecord) -> None:
        """Store one user's own adapter, and note what they are best served with."""
        values = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        run = self.workdir.resolve().name
        self.adapters[user] = self.registry.put_adapter(adapter, user=user, run=run, metrics=values)
        base, shared, personal = (values[name] for name in (BASE_LOSS, SHARED_LOSS, LOSS))
        self.served[user] = served(base=base, shared=shared, personal=personal)

    def remember(self, done: int, shared: Mapping[str, Tensor], **notes: Any) -> None:
        """Checkpoint after a round."""
        notes = {**self.state.notes, **notes}
        self.state = Checkpoint(self.state.key, done, dict(shared), notes, self.aligner.state())
        checkpoints.store(self.workdir, self.state)

    def finish(self) -> None:
        """What the rounds came to."""
        last = self.strategy.logs[-1]
        self.conclude(last, {**self.roll.missing(), **last.refused})

    def conclude(self, last: RoundLog, refused: Mapping[str, str]) -> None:
        """Write result.json, last of all: its presence says that the run is whole.

        Raises:
            FederationError: more users are missing than `federation.min_users` allows.
        """
        least = self.config.federation.min_users
        if lost := (last.lost if not least else []):
            why = [last.refused[user] for user in lost]
            raise FederationError(f"{len(lost)} users sent no adapter: {'; '.join(why)}")
        if len(self.adapters) < max(1, least):
            raise FederationError(
                f"{len(self.adapters)} adapters came back, federation.min_users is {least}: {dict(refused)}"
            )
        adapters.write(self.shared, self.workdir / SHARED_FOLDER)
        self.progress("done", 1.0)
        files.write_text(self.workdir / "result.json", json.dumps(self.result(last, refused), indent=2))

    def result(self, last: RoundLog, refused: Mapping[str, str]) -> dict[str, Any]:
        """What is told of a run that has ended."""
        return {
            "adapters": self.adapters,
            "shared": SHARED_FOLDER,
            "served": self.served,
            "plan": {
                "kept": list(self.plan.kept),
                "adapter_layers": list(self.plan.adapter),
                "hash": self.plan.hash,
                "json": self.plan.to_json(),
            },
            "align": self.state.notes["align"],
            "rounds": [*self.state.notes["rounds"], dataclasses.asdict(last)],
            "refused": dict(refused),
            "mode": self.sharing.mode,
            "privacy": self.privacy(),
        }

    def privacy(self) -> dict[str, Any] | None:
        """What clipping and noise were worth, for the result; None where they are off."""
        settings, notes = self.config.federation, self.state.notes
        releases = notes.get("releases", 0) if settings.noisy_users else len(notes["rounds"])
        found = privacy.spent(settings, releases)
        return dataclasses.asdict(found) if found else None

    def heard(self, node: int, done: int, total: int) -> None:
        """A node has answered; in a round that is told."""
        if self.at is None:
            return
        user, of = self.roll.nodes.get(node, ""), f"{self.at.name} {self.at.round} of {self.at.rounds}"
        self.progress(f"{of}: {done} of {total} users", self.at.share(done / total), user=user)

    def progress(self, note: str, share: float, **known: Any) -> None:
        """Tell the folder how far we are; `share` runs from 0 to 1, of this part of the whole."""
        place = {"round": self.at.round, "rounds": self.at.rounds} if self.at else {}
        begun, ended = self.span
        told = begun + (ended - begun) * min(1.0, share)
        write_progress(self.workdir, {"note": note, "share": told, **place, **known})
