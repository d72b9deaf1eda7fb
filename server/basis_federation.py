"""A federation whose users share an adapter, and then learn, beside it, directions for everybody's cores.

After the shared rounds come rounds in which each user trains a core in U and V as they stand, and sends the
gradients of U and V. They are averaged by the rule of the shared rounds, and Adam takes a step with the mean.

Sources: FedRep (Collins et al., ICML 2021), its representation U and V, its heads the cores; FedAdam of
FedOpt (Reddi et al., ICLR 2021).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint, RoundShare
from server.federation import Federation
from server.strategy import FedBiOT, RoundLog
from soppu.config import Config
from soppu.cores import basis as bases
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis
from soppu.federation import wire, wire_basis
from soppu.federation.basis_adam import BasisAdam
from soppu.federation.modes import Sharing

LEARN = f"{MessageType.TRAIN}.basis"
MODE = "basis"  # of these rounds, in the log
DIRECTIONS = "directions.safetensors"  # in the work folder: what was learnt
_MOMENTS = "adam/"  # in the checkpoint


class BasisRounds(FedBiOT):
    """Means of the gradients of U and V; with U and V goes down the adapter that all share."""

    def __init__(self, *given: Any, beside: ArrayRecord, **named: Any) -> None:
        super().__init__(*given, **named)
        self._beside = beside

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a user: U and V, the emulator's LoRA, the shared adapter, and what to do."""
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content["shared"] = self._beside
            self.logs[-1].bytes_down += self._beside.count_bytes()
            node = message.metadata.dst_node_id
            messages.append(Message(content=message.content, message_type=LEARN, dst_node_id=node))
        self._start = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}
        self._whole = self._start  # what comes back are gradients, and no change of what was sent
        return messages


class BasisFederation(Federation):
    """One run of both. See `Federation`."""

    def __init__(self, config: Config, workdir: Path, *, members: Mapping[int, str] | None = None) -> None:
        super().__init__(config, workdir, members=members)
        settings, agreed = config.federation, self.agreement
        drawn = bases.drawn(
            agreed.shapes,
            settings.basis_rank,
            seed=config.seed,
            base_hash=agreed.base_hash,
            modules=settings.basis_modules,
        )
        drawn = dataclasses.replace(drawn, base_model=agreed.base_model, fan_in_fan_out=agreed.fan_in_fan_out)
        self.folder = workdir / MODE
        how = {name: value for name, value in vars(settings).items() if name.startswith("basis_")}
        self.learnt = checkpoints.load(self.folder, key=f"{self.state.key} {sorted(how.items())}")
        self.learnt.done = max(0, self.learnt.done)
        self.adam = self._adam(drawn)
        shared = settings.rounds * settings.local_steps
        self.until = shared / (shared + settings.basis_rounds * settings.basis_steps)

    def run(self, grid: Grid) -> None:
        """All of it: the rounds of any federation, then those of the basis, then the result."""
        self.span = 0.0, self.until
        self.rounds(grid)
        self.span = self.until, 1.0
        self.learn(grid)
        self.finish()

    def learn(self, grid: Grid) -> None:
        """The rounds of the basis that are not done; with every episode cores begin anew, and Adam too."""
        settings, before = self.config.federation, self.strategy.logs[-1].round
        strategy, timeout = self._strategy(), min(settings.round_timeout_s, settings.timeout_s)
        for number in range(self.learnt.done + 1, settings.basis_rounds + 1):
            since = (number - 1) % settings.basis_episode
            if not since:
                self.adam = BasisAdam(bases.orthonormal(self.adam.basis()), rate=settings.basis_learning_rate)
            order = self._order(first=before + number - since)
            self.at = RoundShare.even(number, settings.basis_rounds, name="basis round")
            strategy.first_round = before + number - 1
            now = ArrayRecord(wire_basis.to_state(self.adam.basis().sides))
            result = strategy.start(grid, now, num_rounds=1, timeout=timeout, train_config=order)
            log, self.at = strategy.logs[-1], None
            self.enough(log)
            if result.arrays is not None:
                self.adam.step(wire_basis.from_state(result.arrays.to_torch_state_dict()))
            self._note(number, log)

    def _adam(self, drawn: CoreBasis) -> BasisAdam:
        """The basis as the last attempt left it, or as it is drawn."""
        rate, held = self.config.federation.basis_learning_rate, self.learnt.tensors
        if not held:
            return BasisAdam(drawn, rate=rate)
        moments = {name: tensor for name, tensor in held.items() if name.startswith(_MOMENTS)}
        sides = wire_basis.from_state({name: held[name] for name in held.keys() - moments.keys()})
        adam = BasisAdam(dataclasses.replace(drawn, sides=sides), rate=rate)
        adam.resume({name.removeprefix(_MOMENTS): tensor for name, tensor in moments.items()})
        return adam

    def _strategy(self) -> BasisRounds:
        settings, rank = self.config.federation, self.config.federation.basis_rank
        agreement = dataclasses.replace(
            self.agreement,
            shapes=self.adam.basis().module_shapes(),
            rank=rank,
            examples=self.roll.examples,
            form=wire.FLOAT32,
            sharing=Sharing("finetune", rank),
        )
        return BasisRounds(
            agreement,
            self.roll.nodes,
            emulator=self._for_round,
            keep=self.keep,
            sharing=dataclasses.replace(settings, average="factors"),  # U and V have no product to average
            beside=ArrayRecord(wire.to_state(self.shared)),
        )

    def _order(self, *, first: int) -> ConfigRecord:
        """What clients are told; their cores are remembered by the settings that they are trained with."""
        settings, run = self.config.federation, hashlib.sha256(self.learnt.key.encode()).hexdigest()[:16]
        told: dict[str, int | str] = {"basis-first": first, "basis-steps": settings.basis_steps, "run": run}
        return ConfigRecord({**self.order(), **told, "core-rate": settings.basis_core_learning_rate})

    def _for_round(self, number: int, arrays: ArrayRecord) -> dict[str, Tensor]:
        """See who has joined, and hand out the emulator as it is: clients have their states already."""
        if self.config.federation.noisy_users:  # before it is: see `Federation.emulator_for_round`
            releases = self.state.notes.get("releases", 0) + 1
            self.remember(self.state.done, self.state.tensors, releases=releases)
        self.roll.ask_again(limit=self.patience_s)
        if at := self.at:
            self.progress(f"{at.name} {at.round} of {at.rounds}", at.share(0.0))
        return wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR)

    def _note(self, number: int, log: RoundLog) -> None:
        """Checkpoint after a round."""
        log.mode = MODE
        rounds = [*self.learnt.notes.get("rounds", []), dataclasses.asdict(log)]
        tensors = wire_basis.to_state(self.adam.basis().sides)
        tensors |= {f"{_MOMENTS}{name}": moment for name, moment in self.adam.moments().items()}
        self.learnt = Checkpoint(self.learnt.key, number, tensors, {"rounds": rounds})
        checkpoints.store(self.folder, self.learnt)

    def result(self, last: RoundLog, refused: Mapping[str, str]) -> dict[str, Any]:
        """As any federation's, and what was learnt."""
        basis_file.write(bases.orthonormal(self.adam.basis()), self.workdir / DIRECTIONS)
        told = super().result(last, refused)
        rounds = [*told["rounds"], *self.learnt.notes["rounds"]]
        return {**told, "rounds": rounds, "directions": DIRECTIONS}
