"""The server's side of FedBiOT: keep the emulator close to the layers it stands for.

The teacher is the full bottom on public text. Below the adapter nothing changes, so its states are
computed once and kept; each step runs only the emulator, with a LoRA of its own as the thing trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from soppu.adapter import LoraAdapter, LoraPair
from soppu.config import AlignConfig
from soppu.data import Block, collate
from soppu.federation import emulator
from soppu.federation.attach import attached, initial_pairs
from soppu.federation.train import CachedBlock, cache_states, mean_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATOR = "generator"


@dataclass(frozen=True)
class AlignLoss:
    """One measurement: l2 = ||h_T - h_S||^2 / ||h_T||^2 over real tokens, kl in nats a token."""

    l2: float
    kl: float


class Aligner:
    """Distils the full bottom into the emulator's LoRA; one AdamW lives across all rounds."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: emulator.LayerPlan,
        *,
        options: AlignConfig,
        pad_id: int,
        seed: int,
    ) -> None:
        self.plan = plan
        self.options = options
        self.pad_id = pad_id
        self.top = emulator.TopModel(model, plan)
        self._student = emulator.with_layers(model, plan.kept)
        self._teacher = emulator.with_layers(model, plan.bottom)
        shapes = emulator.target_shapes(model, plan, plan.kept)
        self.pairs = initial_pairs(shapes, rank=options.rank, seed=seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks: list[Block] = []
        self._states: list[CachedBlock] = []
        self._unseen: list[Block] = []
        self._unseen_states: list[CachedBlock] = []
        self._optimizer: torch.optim.AdamW | None = None

    def observe(self, blocks: Sequence[Block], unseen: Sequence[Block]) -> None:
        """Cache the teacher's states for public text, to train on and to measure with.

        Cost: one forward pass of the full bottom.
        """
        self._blocks, self._unseen = list(blocks), list(unseen)
        self._states = cache_states(self._teacher, self._blocks, pad_id=self.pad_id)
        self._unseen_states = cache_states(self._teacher, self._unseen, pad_id=self.pad_id)

    def adapter(self) -> LoraAdapter:
        """A copy of the emulator's LoRA as it is now, full-model names."""
        pairs = {name: LoraPair(p.A.detach().clone(), p.B.detach().clone()) for name, p in self.pairs.items()}
        return LoraAdapter(pairs, base_hash=self.plan.base_hash)

    def state(self) -> dict[str, Tensor]:
        """All that the next step follows from: the LoRA, AdamW's moments and counts, the blocks to come."""
        state = {_GENERATOR: self._generator.get_state()}
        for name, param in self._named():
            moments = self._optimizer.state.get(param, {}) if self._optimizer else {}
            state |= {f"{name}/{key}": value.detach().clone() for key, value in moments.items()}
            state[name] = param.detach().clone()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an earlier `state`, bit for bit. KeyError if something is missing in it."""
        with torch.no_grad():
            for name, param in self._named():
                param.copy_(state[name])
        self._generator.set_state(state[_GENERATOR])
        moments = {param: _moments(state, name, param) for name, param in self._named()}
        self._optimizer = None
        if any(moments.values()):
            self._start_optimizer().state.update(moments)

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{name}.lora_{side}.weight", getattr(pair, side))
            for name, pair in self.pairs.items()
            for side in ("A", "B")
        ]

    def _start_optimizer(self) -> torch.optim.AdamW:
        params = [param.requires_grad_() for _, param in self._named()]
        self._optimizer = torch.optim.AdamW(params, lr=self.options.learning_rate, weight_decay=0.0)
        return self._optimizer

    def steps(self, count: int, *, user_adapter: LoraAdapter | None = None) -> Iterable[AlignLoss]:
        """Take `count` steps, giving each step's losses as it goes.

        Args:
            user_adapter: the shared adapter at present; both sides of the KL term carry it.
        """
        optimizer = self._optimizer or self._start_optimizer()
        trained = LoraAdapter(self.pairs, base_hash=self.plan.base_hash)
        own = emulator.to_own(trained, self.plan, self.plan.kept)
        top_adapter = emulator.to_own(user_adapter, self.plan, self.plan.adapter) if user_adapter else None
        for _ in range(count):
            drawn = torch.randint(len(self._blocks), (self.options.batch_size,), generator=self._generator)
            chosen = drawn.tolist()
            blocks, states = [self._blocks[n] for n in chosen], [self._states[n] for n in chosen]
            with attached(self._student, own), attached(self.top.model, top_adapter):
                l2, kl = self._losses(blocks, states)
            optimizer.zero_grad(set_to_none=True)
            (l2 + self.options.kl_weight * kl).backward()
            optimizer.step()
            yield AlignLoss(float(l2.detach()), float(kl.detach()))

    @torch.no_grad()
    def measure(self, *, limit: int = 8) -> AlignLoss:
        """Losses on the first `limit` public blocks that nothing is trained on."""
        own = emulator.to_own(self.adapter(), self.plan, self.plan.kept)
        with attached(self._student, own):
            l2, kl = self._losses(self._unseen[:limit], self._unseen_states[:limit])
        return AlignLoss(float(l2), float(kl))

    def public_loss(self, user_adapter: LoraAdapter) -> float:
        """Loss (nats a token) of the full model with an adapter, on the public text not trained on."""
        return mean_loss(self.top, self.plan, self._unseen_states, adapter=user_adapter)

    def _losses(self, blocks: Sequence[Block], states: Sequence[CachedBlock]) -> tuple[Tensor, Tensor]:
        ids, mask, _ = collate(blocks, pad_id=self.pad_id)
        student = emulator.bottom_states(self._student, ids, mask).float()
        teacher = nn.utils.rnn.pad_sequence([block.states for block in states], batch_first=True)
        real = mask.bool()
        l2 = (student - teacher)[real].square().sum() / teacher[real].square().sum()
        if not self.options.kl_weight:
            return l2, torch.zeros(())
        with torch.no_grad():
            wanted = self.top.logits(self.top.hidden(teacher, mask)[real]).float().log_softmax(-1)
        given = self.top.logits(self.top.hidden(student, mask)[real]).float().log_softmax(-1)
        kl = nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
        return l2, kl


def _moments(state: Mapping[str, Tensor], name: str, param: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of one parameter; its count of steps stays on the CPU."""
    own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
    return {key: value.clone() if key == "step" else value.to(param, copy=True) for key, value in own.items()}
