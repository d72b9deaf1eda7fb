"""The one training loop: a LoRA on the top layers, fed with cached states of the frozen part.

Nothing runs backward through the emulator: its output is computed once per example, without gradients,
and the adapter layers start from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from soppu.adapter import LoraAdapter, LoraPair
from soppu.data import IGNORE, Block, collate
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.head_loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOKENS = {"cpu": 2**8, "cuda": 2**14}  # that gradients are worked out for at a time, padding included


@dataclass(frozen=True)
class TrainOptions:
    """How one call of `fit` trains."""

    steps: int = 0  # of the optimiser
    batch_size: int = 4  # examples a step
    learning_rate: float = 1e-3  # AdamW step size of A; B's is `b_ratio` times as large
    # alpha / r. Under Adam the LoRA scale is a step size for B, and this is where it enters
    b_ratio: float = 2.0
    prox_weight: float = 0.0  # of the squared product-space distance to the start
    seed: int = 0  # order of the examples
    held: tuple[int, int] = (0, 0)  # the first rows of A and columns of B that stay as they are


@dataclass(frozen=True, eq=False)
class CachedBlock:
    """A token block with the frozen part's output: states (t, d) in its dtype, on its device; labels (t,)."""

    states: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What `fit` gives back: the adapter (full-model names), and the loss at its first and last steps."""

    adapter: LoraAdapter
    first_loss: float
    last_loss: float
    steps: int


def cache_states(
    bottom: PreTrainedModel, blocks: Sequence[Block], *, pad_id: int, batch_size: int = 8
) -> list[CachedBlock]:
    """Run the frozen layers once over every block, longest together. Cost: one forward pass."""
    order = sorted(range(len(blocks)), key=lambda index: len(blocks[index].ids))
    cached: list[CachedBlock | None] = [None] * len(blocks)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask, _ = collate([blocks[index] for index in chosen], pad_id=pad_id)
        with torch.no_grad():
            states = emulator.bottom_states(bottom, ids, mask)
        for row, index in enumerate(chosen):
            block = blocks[index]
            cached[index] = CachedBlock(states[row, : len(block.ids)].clone(), block.labels)
    return [block for block in cached if block is not None]


def batch_loss(top: emulator.TopModel, blocks: Sequence[CachedBlock]) -> tuple[Tensor, int]:
    """Summed next-token cross-entropy over the unmasked labels (nats), and how many there are.

    The head runs only where a label counts: O(labels x v) instead of O(tokens x v).
    """
    hidden, target, counts = before_head(top, blocks)
    return summed_loss(top.logits, hidden, target), sum(counts)


def before_head(top: emulator.TopModel, blocks: Sequence[CachedBlock]) -> tuple[Tensor, Tensor, list[int]]:
    """States (n, d) that the head predicts unmasked labels from, the labels (n,), how many each block has."""
    pad = nn.utils.rnn.pad_sequence
    states = pad([block.states for block in blocks], batch_first=True)
    labels = pad([block.labels for block in blocks], batch_first=True, padding_value=IGNORE)
    lengths = torch.tensor([len(block.labels) for block in blocks])
    mask = (torch.arange(states.shape[1])[None, :] < lengths[:, None]).long()
    hidden = top.hidden(states, mask)[:, :-1]
    target = labels[:, 1:].to(hidden.device)
    counted = target != IGNORE
    return hidden[counted], target[counted], [_counted(block) for block in blocks]


def backward(top: emulator.TopModel, blocks: Sequence[CachedBlock]) -> float:
    """Mean cross-entropy over the unmasked labels (nats a token); adds its gradient where that is asked for.

    Blocks of about one length go together, a few tokens at a time: less padding, and the activations of some.
    """
    counted = max(1, sum(map(_counted, blocks)))
    total = 0.0
    for group in _groups(blocks, _TOKENS.get(top.device.type, _TOKENS["cpu"])):
        loss = batch_loss(top, group)[0] / counted
        loss.backward()
        total += float(loss.detach())
    return total


def _counted(block: CachedBlock) -> int:
    """Labels that a loss counts."""
    return int((block.labels[1:] != IGNORE).sum())


def _groups(blocks: Sequence[CachedBlock], tokens: int) -> Iterator[list[CachedBlock]]:
    group: list[CachedBlock] = []
    for block in sorted(blocks, key=lambda block: len(block.labels)):
        if group and (len(group) + 1) * len(block.labels) > tokens:
            yield group
            group = []
        group.append(block)
    yield group


@torch.no_grad()
def mean_loss(
    top: emulator.TopModel,
    plan: emulator.LayerPlan,
    blocks: Sequence[CachedBlock],
    *,
    adapter: LoraAdapter | None,
    batch_size: int = 8,
) -> float:
    """Mean cross-entropy over all unmasked labels of the blocks, nats a token.

    Args:
        blocks: behind whichever bottom is to be measured, emulator or full.
        adapter: full-model names; None measures the base model.
    """
    own = emulator.to_own(adapter, plan, plan.adapter) if adapter else None
    summed, counted = 0.0, 0
    with attached(top.model, own):
        for start in range(0, len(blocks), batch_size):
            loss, count = batch_loss(top, blocks[start : start + batch_size])
            summed, counted = summed + float(loss), counted + count
    return summed / max(counted, 1)


def proximal(pairs: Mapping[str, LoraPair], start: Mapping[str, LoraPair]) -> Tensor:
    """Sum over modules of ||B A - B0 A0||_F^2, from r x r Grams, differentiable in A and B.

    Cost: O(r^2 (i + o)) a module; no o x i matrix. FedBiOT's client term (eq. 3), in product space, with a
    gradient: the published code reads detached weights and so adds none.
    """
    terms = [
        _inner(pair, pair) - 2 * _inner(pair, start[name]) + _inner(start[name], start[name])
        for name, pair in pairs.items()
    ]
    return torch.stack(terms).sum()


class Training:
    """A LoRA under training: it can be carried on, looked at, and carried on again.

    Args:
        start: full-model names; its factors are copied, not changed.
        options: `steps` is not read here.
    """

    def __init__(
        self,
        top: emulator.TopModel,
        plan: emulator.LayerPlan,
        blocks: Sequence[CachedBlock],
        *,
        start: LoraAdapter,
        options: TrainOptions,
    ) -> None:
        self.losses: list[float] = []
        self._top, self._plan, self._blocks, self._options = top, plan, blocks, options
        own = emulator.to_own(start, plan, plan.adapter)
        self._origin = {name: pair.to(top.device, torch.float32) for name, pair in own.pairs.items()}
        pairs = {
            name: LoraPair(pair.A.clone().requires_grad_(), pair.B.clone().requires_grad_())
            for name, pair in self._origin.items()
        }
        self._own = replace(start, pairs=pairs)
        rate = options.learning_rate
        sides = {"A": rate, "B": rate * options.b_ratio}
        self._optimizer = torch.optim.AdamW(
            [{"params": [getattr(p, side) for p in pairs.values()], "lr": lr} for side, lr in sides.items()],
            weight_decay=0.0,
        )
        self._batches = batches(len(blocks), options)

    def advance(self, steps: int) -> None:
        """Take optimiser steps. Cost: one forward and one backward pass of the top a step."""
        with attached(self._top.model, self._own):
            for chosen in itertools.islice(self._batches, steps):
                self._optimizer.zero_grad(set_to_none=True)
                self.losses.append(backward(self._top, [self._blocks[index] for index in chosen]))
                if self._options.prox_weight:
                    (self._options.prox_weight * proximal(self._own.pairs, self._origin)).backward()
                self._hold(*self._options.held)
                self._optimizer.step()

    def _hold(self, rows: int, columns: int) -> None:
        """No gradient for the first rows of A and columns of B: Adam without decay then leaves them alone."""
        for pair in self._own.pairs.values():
            assert pair.A.grad is not None and pair.B.grad is not None
            pair.A.grad[:rows] = 0
            pair.B.grad[:, :columns] = 0

    def adapter(self) -> LoraAdapter:
        """A copy of the adapter as it is now: full-model names, float32, on the CPU."""
        own = {name: LoraPair(pair.A.detach(), pair.B.detach()) for name, pair in self._own.pairs.items()}
        pairs = {name: pair.to("cpu", copy=True) for name, pair in own.items()}
        return emulator.to_full(replace(self._own, pairs=pairs), self._plan, self._plan.adapter)


def fit(
    top: emulator.TopModel,
    plan: emulator.LayerPlan,
    blocks: Sequence[CachedBlock],
    *,
    start: LoraAdapter,
    options: TrainOptions,
) -> TrainResult:
    """Train an adapter from `start` on cached blocks, for `options.steps`. See `Training`."""
    training = Training(top, plan, blocks, start=start, options=options)
    training.advance(options.steps)
    losses = training.losses
    return TrainResult(training.adapter(), losses[0], losses[-1], len(losses))


def _inner(left: LoraPair, right: LoraPair) -> Tensor:
    """<B A, B' A'>_F = tr((B^T B') (A' A^T))."""
    return ((left.B.T @ right.B) * (left.A @ right.A.T)).sum()


def batches(n: int, options: TrainOptions) -> Iterator[list[int]]:
    """Index lists without end, every example once before any comes again, in an order fixed by the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    size = min(options.batch_size, n)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(n, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]
