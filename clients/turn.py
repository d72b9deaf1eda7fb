"""One user's turn in a round: what training begins with, what of it is held, what stays here, what leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clients import privacy
from clients.workbench import Workbench
from soppu.adapter import LoraAdapter
from soppu.federation import modes, wire
from soppu.federation.modes import Sharing, State
from soppu.federation.own_part import OwnPart

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What the server asks for: a round of a run, and whether it is the personal one."""

    number: int
    personal: bool
    run: str = ""


class Turn:
    """A user's turn.

    Args:
        shared: the tensors that came, of what everybody shares.

    Attributes:
        start: the whole adapter that training begins with.
        since: the round that the user's own part of it is from; 0 where it is as all began.

    Raises:
        AdapterError: the tensors are not those of the mode.
        FederationError: what was remembered is damaged, or the server names no run.
    """

    def __init__(self, bench: Workbench, asked: Asked, shared: Mapping[str, Tensor], *, user_id: str) -> None:
        self.asked = asked
        self.sharing = Sharing.of(bench.config)
        self._settings = bench.config.federation
        self._memory: OwnPart | None = None
        wire.check(shared, self.sharing.sent(bench.shapes, personal=False), who="server")
        own, self.since = self.sharing.start(bench.shapes)[1], 0
        self._begun = self.sharing.join(shared, own)  # before anything of the user's text is in it
        if self.sharing.remembers:
            self._memory = OwnPart.of(self._settings.client_state, run=asked.run, user=user_id)
            self.since, remembered = self._memory.recall(before=asked.number)
            own = remembered or own
            if asked.number > 1 and self.since != asked.number - 1:
                _LOG.warning("round %d: own part of %s is of round %d", asked.number, user_id, self.since)
        like = LoraAdapter({}, bench.config.base.model, bench.plan.base_hash, bench.plan.fan_in_fan_out)
        self.start = modes.export(self.sharing.join(shared, own), like)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: in the mode shared nobody trains alone."""
        return self.sharing.trains_alone or not self.asked.personal

    @property
    def told(self) -> dict[str, int]:
        """What the server hears of the user's own part."""
        return {"own-since": self.since} if self._memory else {}

    @property
    def held(self) -> tuple[int, int]:
        """How many rows of A and columns of B training leaves as they are."""
        return self.sharing.held(personal=self.asked.personal)

    def common(self) -> LoraAdapter | None:
        """What anybody could be served of what is shared; None where that is `start`."""
        return modes.export(self._begun, self.start) if self.sharing.remembers else None

    def released(self, trained: LoraAdapter) -> LoraAdapter:
        """The adapter as it leaves: clipped and noised where the configuration wants that at the client."""
        if not (self._settings.noisy_users and self.trains):
            return trained
        whole = wire.to_state(trained)
        if self.asked.personal:
            return modes.export(self._hidden(whole, self._begun), trained)
        shared, own = self.sharing.split(whole)
        begun = self.sharing.split(self._begun)[0]
        return modes.export(self.sharing.join(self._hidden(shared, begun), own), trained)

    def remember(self, trained: LoraAdapter) -> None:
        """Keep the user's own part for the next round. The last one leaves it: it may be asked for again."""
        if self._memory and not self.asked.personal:
            self._memory.keep(self.asked.number, self.sharing.split(wire.to_state(trained))[1])

    def sent(self, state: State) -> State:
        """What of a packed adapter goes back to the server."""
        if not self.trains:
            return {}
        return state if self.asked.personal else self.sharing.split(state)[0]

    def _hidden(self, state: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> State:
        """Clipped and noised where anything was trained; what was held is no secret."""
        hidden = privacy.hidden(state, begun, self._settings)
        rows, columns = self.held
        for name, tensor in hidden.items():
            axis, held = (0, rows) if name.endswith("A.weight") else (1, columns)
            known = min(held, tensor.shape[axis])
            tensor.narrow(axis, 0, known).copy_(begun[name].narrow(axis, 0, known))
        return hidden
