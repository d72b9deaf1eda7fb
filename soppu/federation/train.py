"""The one training loop: adapters of one user or of many, fed with cached states of the frozen part.

Nothing runs backward through the emulator: its output is computed once per example, without gradients,
and the adapter layers start from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Self

import torch
from torch import Tensor, nn

from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores.basis import CoreBasis
from soppu.data import IGNORE, Block, collate
from soppu.errors import AdapterError
from soppu.federation import emulator
from soppu.federation.attach import attached
from soppu.federation.head_loss import row_losses
from soppu.federation.trained import Kind, Sides, Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from soppu.config import Config


_TOKENS = {"cpu": 2**8, "cuda": 2**14}  # of one user's that gradients are worked out for at a time
_STATES = {"cpu": 2**18, "cuda": 2**26}  # numbers of many users' states at a time


@dataclass(frozen=True)
class TrainOptions:
    """How one call of `fit` trains."""

    steps: int = 0  # of the optimiser
    batch_size: int = 4  # examples a step
    learning_rate: float = 1e-3  # AdamW step size of A; that of B, and of cores, is `b_ratio` times as large
    # alpha / r. Under Adam the LoRA scale is a step size for B, and this is where it enters
    b_ratio: float = 2.0
    prox_weight: float = 0.0  # of the squared product-space distance to the start
    seed: int = 0  # order of the examples
    held: tuple[int, int] = (0, 0)  # the first rows of A and columns of B that stay as they are
    basis_rate: float = 0.0  # AdamW step size of the U and V that all cores share; 0 leaves them

    @classmethod
    def of(cls, config: Config, *, learning_rate: float, seed: int) -> Self:
        """How a user of a run trains; who calls says how far."""
        return cls(
            batch_size=config.federation.batch_size,
            learning_rate=learning_rate,
            b_ratio=config.lora.alpha / config.lora.rank,
            prox_weight=config.federation.prox_weight,
            seed=seed,
        )


@dataclass(frozen=True, eq=False)
class CachedBlock:
    """A token block with the frozen part's output: states (t, d) in its dtype, on its device; labels (t,)."""

    states: Tensor
    labels: Tensor

    @cached_property
    def counted(self) -> int:
        """Labels that a loss counts: asked for at every step, and the same at all."""
        return int((self.labels[1:] != IGNORE).sum())


_Placed = tuple[CachedBlock, int]  # and whose it is


@dataclass(frozen=True, eq=False)
class TrainResult(Generic[Kind]):
    """What `fit` gives back: what was trained (full-model names), the loss at its first and last steps."""

    adapter: Kind
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
    return row_losses(top.logits, hidden, target).sum(), sum(counts)


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
    return hidden[counted], target[counted], [block.counted for block in blocks]


def backward(top: emulator.TopModel, blocks: Sequence[CachedBlock]) -> float:
    """Mean cross-entropy over the unmasked labels (nats a token); adds its gradient where that is asked for.

    Blocks of about one length go together, a few tokens at a time: less padding, and the activations of some.
    """
    return backward_each(top, [blocks], lambda row: nullcontext())[0]


def backward_each(
    top: emulator.TopModel,
    blocks: Sequence[Sequence[CachedBlock]],
    answering: Callable[[Tensor], AbstractContextManager[None]],
) -> list[float]:
    """As `backward` for each of some users: their losses; the gradient added is that of the sum of these.

    Args:
        blocks: of every user.
        answering: users' numbers (b,) -> has the model answer example b of a batch for user `row[b]`.
    """
    counted = torch.tensor([max(1, sum(block.counted for block in own)) for own in blocks]).to(top.device)
    total = torch.zeros(len(blocks), device=top.device, dtype=torch.float64)
    placed = [(block, user) for user, own in enumerate(blocks) for block in own]
    for group in _groups(placed, tokens_at_once(top.width, len(blocks), on=top.device.type)):
        row = torch.tensor([user for _, user in group])
        with answering(row.to(top.device)):
            hidden, target, counts = before_head(top, [block for block, _ in group])
            whose = row.repeat_interleave(torch.tensor(counts)).to(top.device)
            losses = row_losses(top.logits, hidden, target) / counted[whose]
            losses.sum().backward()
        total.index_add_(0, whose, losses.detach().double())
    return total.cpu().tolist()


def tokens_at_once(width: int, users: int, *, on: str) -> int:
    """Tokens, padding included, that gradients are worked out for at a time, or losses.

    Of many users they are as many as have so many numbers of states: where a model is narrow, the number of
    passes is what takes the time; where it is wide, more in a pass only take memory.

    Args:
        width: of the model.
        on: kind of device, "cpu" or "cuda"; any other is counted as a CPU.
    """
    kind = on if on in _TOKENS else "cpu"
    return _TOKENS[kind] if users == 1 else max(_TOKENS[kind], _STATES[kind] // width)


def _groups(placed: Sequence[_Placed], tokens: int) -> Iterator[list[_Placed]]:
    group: list[_Placed] = []
    for one in sorted(placed, key=lambda one: len(one[0].labels)):
        if group and (len(group) + 1) * len(one[0].labels) > tokens:
            yield group
            group = []
        group.append(one)
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


@torch.no_grad()
def mean_losses(
    top: emulator.TopModel,
    plan: emulator.LayerPlan,
    blocks: Sequence[Sequence[CachedBlock]],
    *,
    adapters: Sequence[Kind] | None,
) -> list[float]:
    """As `mean_loss` for each of some users, all in the same passes.

    Args:
        blocks: of every user.
        adapters: of every user, as `Trained` takes them; None measures the base model.
    """
    trained: Trained[Kind] | None = Trained(adapters, plan, top.device) if adapters else None
    total, counted = torch.zeros(len(blocks), dtype=torch.float64), torch.zeros(len(blocks))
    placed = [(block, user) for user, own in enumerate(blocks) for block in own]
    for group in _groups(placed, tokens_at_once(top.width, len(blocks), on=top.device.type)):
        row = torch.tensor([user for _, user in group])
        with trained.attached(top.model, row.to(top.device)) if trained else nullcontext():
            hidden, target, counts = before_head(top, [block for block, _ in group])
            losses = row_losses(top.logits, hidden, target)
        total.index_add_(0, row.repeat_interleave(torch.tensor(counts)), losses.double().cpu())
        counted.index_add_(0, row, torch.tensor(counts, dtype=torch.float32))
    return (total / counted.clamp(min=1)).tolist()


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


class Together(Generic[Kind]):
    """Users under training, all in one forward and one backward pass a step; each as they would be alone.

    Args:
        blocks: of every user, to train on.
        starts: where every user begins, full-model names; copied, not changed. See `Trained`.
        options: `steps` is not read here; the order of a user's examples follows from how many there are.
    """

    def __init__(
        self,
        top: emulator.TopModel,
        plan: emulator.LayerPlan,
        blocks: Sequence[Sequence[CachedBlock]],
        *,
        starts: Sequence[Kind],
        options: TrainOptions,
    ) -> None:
        self.losses: list[list[float]] = []  # a step: of every user
        self._top, self._blocks, self._options = top, blocks, options
        self._trained: Trained[Kind] = Trained(starts, plan, top.device)
        self._drifts = bool(options.prox_weight) and self._trained.drift() is not None
        users = range(len(starts)) if options.prox_weight and not self._drifts else ()
        with torch.no_grad():
            self._origins = {user: _copied(self._trained.pairs(user)) for user in users}
        slow, fast = options.learning_rate, options.learning_rate * options.b_ratio
        groups = [{"params": self._trained.parameters("A"), "lr": slow}]
        groups += [{"params": self._trained.parameters("B", "core"), "lr": fast}]
        if options.basis_rate and options.prox_weight:
            raise AdapterError("prox_weight holds cores to where they began in one basis; this one is learnt")
        if options.basis_rate:
            groups += [{"params": self._trained.learn_basis(), "lr": options.basis_rate}]
        self._optimizer = torch.optim.AdamW([one for one in groups if one["params"]], weight_decay=0.0)
        self._batches = [batches(len(own), options) for own in blocks]

    @property
    def users(self) -> range:
        """Their numbers."""
        return range(len(self._blocks))

    def advance(self, steps: int, users: Collection[int] | None = None) -> None:
        """Take optimiser steps. Cost: one forward and one backward pass of the top a step, of every user.

        Args:
            users: by number, those who still train; all by default. What the others have is of no use then.
        """
        for _ in range(steps):
            chosen = [
                [own[index] for index in next(order)] if users is None or user in users else []
                for user, (own, order) in enumerate(zip(self._blocks, self._batches, strict=True))
            ]
            self._optimizer.zero_grad(set_to_none=True)
            self.losses.append(backward_each(self._top, chosen, self._answering))
            if self._drifts and (drift := self._trained.drift()) is not None:
                (self._options.prox_weight * drift).backward()
            for user, origin in self._origins.items():
                if chosen[user]:
                    (self._options.prox_weight * proximal(self._trained.pairs(user), origin)).backward()
            self._trained.hold(*self._options.held)
            self._optimizer.step()

    def adapter(self, user: int) -> Kind:
        """A copy of what a user has now: full-model names, float32, on the CPU."""
        return self._trained.adapter(user)

    def basis(self) -> CoreBasis:
        """A copy of the basis that users' cores are in now: float32, on the CPU."""
        return self._trained.basis()

    def watch_basis(self) -> None:
        """Sum the gradients of the U and V that all cores share over the steps to come; no step follows them.

        Raises:
            AdapterError: what is trained has no basis.
        """
        self._trained.learn_basis()

    def basis_gradient(self) -> Sides:
        """That sum so far, over all users: full-model name -> (that of U, that of V), on the CPU."""
        return self._trained.basis_gradient()

    def _answering(self, row: Tensor) -> AbstractContextManager[None]:
        return self._trained.attached(self._top.model, row)


class Training(Generic[Kind]):
    """One user under training: it can be carried on, looked at, and carried on again. See `together`."""

    def __init__(
        self,
        top: emulator.TopModel,
        plan: emulator.LayerPlan,
        blocks: Sequence[CachedBlock],
        *,
        start: Kind,
        options: TrainOptions,
    ) -> None:
        self.together: Together[Kind] = Together(top, plan, [blocks], starts=[start], options=options)

    @property
    def losses(self) -> list[float]:
        """The training loss of every step so far, nats a token."""
        return [loss for (loss,) in self.together.losses]

    def advance(self, steps: int) -> None:
        """Take optimiser steps. Cost: one forward and one backward pass of the top a step."""
        self.together.advance(steps)

    def adapter(self) -> Kind:
        """A copy of what is trained as it is now: full-model names, float32, on the CPU."""
        return self.together.adapter(0)


def fit(
    top: emulator.TopModel,
    plan: emulator.LayerPlan,
    blocks: Sequence[CachedBlock],
    *,
    start: Kind,
    options: TrainOptions,
) -> TrainResult[Kind]:
    """Train from `start` on cached blocks, for `options.steps`. See `Training`."""
    training = Training(top, plan, blocks, start=start, options=options)
    training.advance(options.steps)
    losses = training.losses
    return TrainResult(training.adapter(), losses[0], losses[-1], len(losses))


def _copied(pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    return {name: LoraPair(pair.A.clone(), pair.B.clone()) for name, pair in pairs.items()}


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
