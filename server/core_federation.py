"""A federation of cores: every user's numbers inside one basis, trained once, sent back, stored.

There is one round, the personal one. Everybody begins where the adapter that the cohort shared lies in the
basis. Simulated nodes are asked for many users at a time, wave after wave; nodes of their own for their user.
After each wave there is a checkpoint, and who has a core by then is not asked again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server import checkpoint as checkpoints
from server.checkpoint import WARM_UP
from server.core_agreement import CoreAgreement
from server.core_round import CoreLog, CoreRound
from server.core_waves import Wave, Waves
from server.federation import Federation
from server.strategy import PERSONAL, RoundLog
from soppu.config import Config
from soppu.cores import basis_file
from soppu.cores import core as cores
from soppu.cores import folder as core_folder
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.errors import FederationError
from soppu.federation import chosen_basis, memory, privacy, wire, wire_core
from soppu.federation.attach import initial_pairs
from soppu.federation.chosen_basis import COHORT

SHARED_CORE = "shared-core"  # in the work folder: what everybody began with
_PAUSE_S = 0.5


class CoreFederation(Federation):
    """One run of cores. See `Federation`.

    Raises:
        FederationError: the work folder names no basis.
        RegistryError: the basis is not in the registry.
    """

    def __init__(self, config: Config, workdir: Path, *, members: Mapping[int, str] | None = None) -> None:
        super().__init__(config, workdir, members=members)
        chosen = chosen_basis.read(workdir)
        if chosen is None or not chosen.basis_id:
            raise FederationError(f"{workdir}: names no basis to train cores in; prepare the run again")
        self.chosen, self.basis = chosen, self.registry.get_basis(chosen.basis_id)
        shared = self.registry.get_start(chosen.basis_id)
        core = from_lora(shared, self.basis, who="shared adapter").core if shared else cores.zero(self.basis)
        self.start = CoreInBasis(core, self.basis, who="server")
        self.shared = shared or self.start.to_lora()
        self.before = _read(workdir / COHORT / "result.json")
        if self.state.notes.get("basis") != chosen.basis_id:
            self.state = checkpoints.Checkpoint(self.state.key)
        notes = self.state.notes
        self.adapters = {**chosen.adapters, **notes.get("adapters", {})}
        self.served = {**chosen.served, **notes.get("served", {})}
        begun = CoreLog(len(self.before.get("rounds", [])) + 1, PERSONAL)
        self.log = CoreLog.of(notes["log"]) if "log" in notes else begun

    def run(self, grid: Grid) -> None:
        """All of it: hello, warm-up, the round, result."""
        self.progress("asking who is there", 0)
        self.here(grid)
        self.warm_up()
        self.save(releases=self.state.notes.get("releases", 0) + 1)  # before a core is sent: it may be twice
        nodes = self.roll.nodes if self.members is not None else None
        heard = {*self.log.accepted, *self.log.refused} - set(self.log.lost)
        self.log.refused = {user: why for user, why in self.log.refused.items() if user in heard}
        self.log.lost = []
        waiting = [user for user in self.expected(nodes) if user not in heard]
        waves = Waves(waiting, together=self.config.federation.together, nodes=nodes)
        round_, has = self.core_round(), self.holders(grid)
        while wave := waves.next(sorted(grid.get_node_ids())):
            started = time.monotonic()
            for users in self.ask(grid, round_, wave, has):
                for user in waves.failed(users):
                    round_.lose(user, f"{user}: the client crashed, or gave no answer in time")
            self.log.seconds += time.monotonic() - started
            self.save(log=dataclasses.asdict(self.log), adapters=self.adapters, served=self.served)
        missing = self.roll.missing() if nodes is not None else {}
        self.conclude(self.log, {**self.before.get("refused", {}), **missing, **self.log.refused})

    def here(self, grid: Grid) -> None:
        """See who is there: users' own nodes are asked for their names; simulated ones are waited for."""
        if self.members is not None:
            self.hello(grid, self.order())
            return
        wanted, deadline = memory.core_nodes(self.config), time.monotonic() + self.patience_s
        while len(list(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if not list(grid.get_node_ids()):
            raise FederationError(f"no simulated node came within {self.patience_s:.0f} s")

    def expected(self, nodes: Mapping[int, str] | None) -> Sequence[str]:
        """Whom a core is wanted of: everybody, or whose node is there."""
        return self.config.data.users if nodes is None else sorted(nodes.values())

    def order(self) -> ConfigRecord:
        """As for adapters, with the name of the basis."""
        return ConfigRecord({**super().order(), "basis": self.basis.id})

    def core_round(self) -> CoreRound:
        """What every node is asked, and what its reply has to be."""
        rank = self.config.federation.core_own_rank
        own = initial_pairs(self.basis.module_shapes(), rank=rank, seed=self.config.seed) if rank else {}
        shared = self.start.core
        begun = wire_core.to_state(dataclasses.replace(shared, own=own), common=self.basis.common)
        return CoreRound(
            CoreAgreement(self.agreement, self.basis, rank, shared, begun),
            emulator=ArrayRecord(wire.to_state(self.aligner.adapter(), prefix=wire.EMULATOR)),
            start=ArrayRecord(wire_core.to_state(shared)),
            order=self.order(),
            basis=basis_file.encode(self.basis),
            log=self.log,
            keep=self.keep,
        )

    def holders(self, grid: Grid) -> set[int]:
        """The nodes that say they have the basis on their disk; who does not answer is taken not to."""
        nodes, content = list(grid.get_node_ids()), RecordDict({"config": self.order()})
        asked = [Message(content, message_type="query.basis", dst_node_id=node) for node in nodes]
        replies = grid.send_and_receive(asked, timeout=self.patience_s) if asked else []
        answered = [reply for reply in replies if reply.has_content()]
        said = {one.metadata.src_node_id: one.content.config_records.get("basis") for one in answered}
        return {node for node, record in said.items() if record is not None and record.get("has") is True}

    def ask(self, grid: Grid, round_: CoreRound, wave: Wave, has: set[int]) -> list[tuple[str, ...]]:
        """One wave; gives those whose client crashed or was silent. `has` grows by who was sent the basis."""
        self.tell(f"asking {sum(map(len, wave.values()))} more")
        asked = [round_.message(node, users, basis=node not in has) for node, users in wave.items()]
        timeout = min(self.config.federation.round_timeout_s, self.config.federation.timeout_s)
        came = {
            reply.metadata.src_node_id: reply
            for reply in grid.send_and_receive(asked, timeout=timeout)
            if reply.has_content() and reply.metadata.src_node_id in wave
        }
        has |= came.keys()
        round_.read({wave[node]: reply for node, reply in came.items()})
        return [users for node, users in wave.items() if node not in came]

    def warm_up(self) -> None:
        """Align the emulator, or take it over: from a checkpoint, or as the cohort's federation left it."""
        if self.state.done >= 0 or not self.before:
            super().warm_up()
            return
        told = json.loads((self.workdir / COHORT / checkpoints.STATE).read_text())
        cohort = checkpoints.load(self.workdir / COHORT, key=told["key"])
        self.aligner.load(cohort.aligner)
        self.begin(self.before["align"])

    def begin(self, align: Mapping[str, Any]) -> None:
        """Nothing is shared but what lies in the registry."""
        self.remember(0, {}, align=align, rounds=[])

    def save(self, **notes: Any) -> None:
        """Checkpoint: who has a core by now."""
        self.remember(0, {}, basis=self.basis.id, **notes)

    def tell(self, what: str) -> None:
        """How many of those who train cores have one."""
        done, total = len(self.log.accepted), max(1, len(self.config.data.users))
        note = f"cores: {done} of {total} users, {what}"
        self.progress(note, WARM_UP + (1 - WARM_UP) * done / total)

    def result(self, last: RoundLog, refused: Mapping[str, str]) -> dict[str, Any]:
        """What is told of the cohort's federation and of this one together."""
        core_folder.write(self.start.core, self.workdir / SHARED_CORE)
        told = super().result(last, refused)
        of_cores = {"form": "core", "basis": self.basis.id, "shared_core": SHARED_CORE}
        return {**told, **of_cores, "rounds": [*self.before.get("rounds", []), *told["rounds"]]}

    def privacy(self) -> dict[str, Any] | None:
        """What clipping and noise were worth to whoever gave most away: of the cohort, or of the others."""
        settings = self.config.federation
        cohort = (self.before.get("privacy") or {}).get("releases", 0)
        found = privacy.spent(settings, max(cohort, self.state.notes["releases"]))
        return dataclasses.asdict(found) if found else None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
