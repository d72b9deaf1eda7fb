"""A federation whose users share an adapter, and then learn, beside it, directions for everybody's cores.

After the shared rounds come rounds in which each user trains a core that begins at nothing, and U and V with
it. What comes back of U and V is averaged by the rule of the shared rounds, the mean change is taken some
times, and the result is made orthonormal. Cores stay.

Sources: FedRep (Collins et al., ICML 2021), its representation U and V, its heads the cores; the server's
own step size is that of FedOpt (Reddi et al., ICLR 2021) with SGD at the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint, RoundShare
from server.federation import Federation
from server.patience import has_stalled
from server.strategy import FedBiOT, RoundLog
from soppu.config import Config
from soppu.cores import basis as bases
from soppu.cores import basis_file
from soppu.cores.basis import CoreBasis
from soppu.federation import wire, wire_basis
from soppu.federation.modes import Sharing

LEARN = f"{MessageType.TRAIN}.basis"
MODE = "basis"  # of these rounds, in the log
DIRECTIONS = "directions.safetensors"  # in the work folder: what was learnt


class BasisRounds(FedBiOT):
    """Means of U and V, each told as a LoRA's factors; with the order goes the adapter that all share."""

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
        self.basis = dataclasses.replace(
            drawn, base_model=agreed.base_model, fan_in_fan_out=agreed.fan_in_fan_out
        )
        self.folder = workdir / MODE
        how = {name: value for name, value in vars(settings).items() if name.startswith("basis_")}
        self.learnt = checkpoints.load(self.folder, key=f"{self.state.key} {sorted(how.items())}")
        self.learnt.done = max(0, self.learnt.done)
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
        """As many rounds as are wanted, fewer where users' validation losses have stopped falling."""
        settings, before = self.config.federation, self.strategy.logs[-1].round
        strategy, order = self._strategy(), self._order()
        if self.learnt.tensors:
            self.basis = wire_basis.from_state(self.learnt.tensors, self.basis)
        while self.learnt.done < settings.basis_rounds and not self._stalled():
            number = self.learnt.done + 1
            self.at = RoundShare.even(number, settings.basis_rounds, name="basis round")
            strategy.first_round = before + number - 1
            timeout = min(settings.round_timeout_s, settings.timeout_s)
            begun = wire_basis.to_state(self.basis)
            result = strategy.start(
                grid, ArrayRecord(begun), num_rounds=1, timeout=timeout, train_config=order
            )
            log, self.at = strategy.logs[-1], None
            self.enough(log)
            averaged = result.arrays.to_torch_state_dict() if result.arrays else begun
            self.basis = self._further(begun, averaged)
            self._note(number, log)

    def _further(self, begun: Mapping[str, Tensor], averaged: Mapping[str, Tensor]) -> CoreBasis:
        """The mean of what users changed, enlarged: most of what each of them changes is not the others'."""
        rate = self.config.federation.basis_server_learning_rate
        state = {name: old + rate * (averaged[name] - old) for name, old in begun.items()}
        return bases.orthonormal(wire_basis.from_state(state, self.basis))

    def _strategy(self) -> BasisRounds:
        settings, rank = self.config.federation, self.config.federation.basis_rank
        agreement = dataclasses.replace(
            self.agreement,
            shapes=self.basis.module_shapes(),
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
            sharing=dataclasses.replace(settings, average="factors"),  # U V^T itself means nothing
            beside=ArrayRecord(wire.to_state(self.shared)),
        )

    def _order(self) -> ConfigRecord:
        settings = self.config.federation
        told = {"basis-steps": settings.basis_steps, "basis-rate": settings.basis_learning_rate}
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

    def _stalled(self) -> bool:
        losses = [log["emulator_loss"] for log in self.learnt.notes.get("rounds", []) if log["accepted"]]
        return has_stalled(losses, self.config.federation.patience)

    def _note(self, number: int, log: RoundLog) -> None:
        """Checkpoint after a round."""
        log.mode = MODE
        rounds = [*self.learnt.notes.get("rounds", []), dataclasses.asdict(log)]
        tensors = wire_basis.to_state(self.basis)
        self.learnt = Checkpoint(self.learnt.key, number, tensors, {"rounds": rounds})
        checkpoints.store(self.folder, self.learnt)

    def result(self, last: RoundLog, refused: Mapping[str, str]) -> dict[str, Any]:
        """As any federation's, and what was learnt."""
        basis_file.write(self.basis, self.workdir / DIRECTIONS)
        told = super().result(last, refused)
        rounds = [*told["rounds"], *self.learnt.notes["rounds"]]
        return {**told, "rounds": rounds, "directions": DIRECTIONS}
