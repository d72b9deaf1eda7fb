"""What of an adapter everybody shares, and what is the user's own: one cut along the rank for every mode.

Of a module's factors A (r, i) and B (o, r) the first `shared_a` rows of A and the first `shared_b` columns of
B are shared: they alone travel in a shared round, and are averaged. The rest never leaves its user before the
personal round, in which the whole adapter is handed in, plain LoRA of the full model's names.

    mode      shared_a  shared_b  held in the personal round
    shared    r         r         (everybody is given the average)
    finetune  r         r         nothing
    fedsa     r         0         A
    dual      r - r_u   r - r_u   what is shared
    ffa       0         r         A, as in every round
    local     0         0         nothing (there is no other)

Sources: FedBiOT (arXiv 2406.17706) for `shared`; FedSA-LoRA (arXiv 2410.01463), which saw that A learns what
users have in common and B what they have not; FFA-LoRA (arXiv 2403.12313), for which the mean of products is
exact; FedDPA (arXiv 2403.19211), a shared adapter beside a private one, for `dual`, where both parts take
their steps together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.federation import wire
from soppu.federation.attach import initial_pairs

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, int]]  # full-model name -> (o, i)


@dataclass(frozen=True)
class Sharing:
    """The cut.

    Attributes:
        mode: one of the names above.
        rank: r, of the whole adapter.
        seed: of the A that every user begins with.
        own_rank: r_u, of the mode dual alone.
    """

    mode: str
    rank: int
    seed: int = 0
    own_rank: int = 0

    @classmethod
    def of(cls, config: Config) -> Sharing:
        """As a configuration wants it."""
        rank = config.lora.rank
        return cls(config.federation.mode, rank, config.seed, config.federation.own_rank(rank))

    @property
    def shared_a(self) -> int:
        """Rows of A that are shared, the first ones."""
        return 0 if self.mode in ("ffa", "local") else self.rank - self.own_rank

    @property
    def shared_b(self) -> int:
        """Columns of B that are shared, the first ones."""
        return 0 if self.mode in ("fedsa", "local") else self.rank - self.own_rank

    @property
    def remembers(self) -> bool:
        """Whether a user's own part is trained in shared rounds, and so has to outlive them."""
        return self.mode in ("fedsa", "dual")

    @property
    def trains_alone(self) -> bool:
        """Whether anybody trains in the personal round."""
        return self.mode != "shared"

    @property
    def in_common(self) -> bool:
        """Whether what is shared changes the model by itself, and so could be served to anybody."""
        return self.mode not in ("fedsa", "local")

    def shared_rounds(self, rounds: int) -> int:
        """How many of the rounds asked for there are."""
        return 0 if self.mode == "local" else rounds

    def held(self, *, personal: bool) -> tuple[int, int]:
        """How many rows of A and columns of B, the first ones, a round's training leaves as they are."""
        if self.mode == "ffa" or (self.mode == "fedsa" and personal):
            return self.rank, 0
        return (self.shared_a, self.shared_b) if self.mode == "dual" and personal else (0, 0)

    def sent(self, shapes: Shapes, *, personal: bool) -> dict[str, tuple[int, int]]:
        """Name -> shape of exactly the tensors that a user sends back."""
        if personal:
            return wire.tensors(shapes, self.rank, self.rank) if self.trains_alone else {}
        return wire.tensors(shapes, self.shared_a, self.shared_b)

    def split(self, state: Mapping[str, Tensor]) -> tuple[State, State]:
        """Whole adapter -> (shared, own) tensors, under the same names; parts of no rank are left out."""
        shared, own = {}, {}
        for name, tensor in state.items():
            at, axis = self._cut(name)
            if at:
                shared[name] = tensor.narrow(axis, 0, at).contiguous()
            if at < self.rank:
                own[name] = tensor.narrow(axis, at, self.rank - at).contiguous()
        return shared, own

    def join(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
        """The whole again: shared and own rows and columns side by side, which is the sum of two LoRAs."""
        names = sorted({*shared, *own})
        return {name: torch.cat(list(self._parts(name, shared, own)), self._cut(name)[1]) for name in names}

    def start(self, shapes: Shapes) -> tuple[State, State]:
        """(Shared, own) before the first round: A from the seed, B zero, the same for all."""
        return self.split(wire.to_state(LoraAdapter(initial_pairs(shapes, rank=self.rank, seed=self.seed))))

    def _cut(self, name: str) -> tuple[int, int]:
        """(Where along which axis a tensor is cut.)"""
        return (self.shared_a, 0) if name.endswith(".lora_A.weight") else (self.shared_b, 1)

    @staticmethod
    def _parts(name: str, *states: Mapping[str, Tensor]) -> Iterator[Tensor]:
        return (state[name] for state in states if name in state)


def export(state: Mapping[str, Tensor], like: LoraAdapter) -> LoraAdapter:
    """One plain LoRA of a whole adapter's tensors, for the base model that `like` is for."""
    return replace(like, pairs=wire.loose_from_state(state).pairs)
