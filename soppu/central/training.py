"""The training loop of the pooled text, on one process or several: the same global batches on any number.

Hugging Face Accelerate distributes it: DistributedDataParallel, or DeepSpeed where it is launched so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType

from soppu import files
from soppu.adapter import LoraPair
from soppu.central.pooled import Pooled, Sample, counted, padded
from soppu.errors import AdapterError, ConfigError
from soppu.federation.train import TrainOptions, batches
from soppu.progress.telling import Tell

Pairs = Mapping[str, LoraPair]
_LOOK = 8  # examples of a validation batch


@dataclass(frozen=True)
class Schedule:
    """How far one training goes: at most `train.steps`, less where validation says so."""

    train: TrainOptions  # steps, batch_size over all processes, learning_rate, b_ratio, seed
    check_every: int = 10  # steps between two looks at the validation loss
    patience: int = 3  # looks in a row without a better one that end it


@dataclass
class State:
    """Where a training is, and what was best so far: what a checkpoint has beside the optimiser."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # training loss of every step, nats a token
    looks: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    best: Pairs = field(default_factory=dict)
    best_step: int = 0

    @property
    def worse(self) -> int:
        """Looks in a row that found nothing better."""
        return sum(step > self.best_step for step, _ in self.looks)


class CentralTraining:
    """One LoRA under training on this process's share of every batch.

    Args:
        accelerator: prepared for however many processes there are; DeepSpeed where it was launched so.
        pooled: the model, alike on every process.
        train, validation: all samples, alike on every process.

    Raises:
        ConfigError: a batch has less than one example for each process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pooled: Pooled,
        samples: tuple[Sequence[Sample], Sequence[Sample]],
        *,
        schedule: Schedule,
    ) -> None:
        self._accelerator, self._pooled, self._schedule = accelerator, pooled, schedule
        self._train, self._validation = samples
        options = schedule.train
        self.batch = min(options.batch_size, len(self._train))
        if self.batch < accelerator.num_processes:
            raise ConfigError(
                f"batch = {self.batch}, allowed: at least {accelerator.num_processes}, one example a process"
            )
        rates = {"A": options.learning_rate, "B": options.learning_rate * options.b_ratio}
        groups = [{"params": pooled.side(side), "lr": rate} for side, rate in rates.items()]
        if self.sharded:  # no data loader tells it
            plugin = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = -(
                -self.batch // accelerator.num_processes
            )
        prepared = accelerator.prepare(pooled, torch.optim.AdamW(groups, weight_decay=0.0))
        self._model, self._optimizer = cast(tuple[Any, Any], prepared)
        self.state = State()

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed holds the parameters, in parts."""
        return bool(self._accelerator.distributed_type == DistributedType.DEEPSPEED)

    def fit(
        self, checkpoint: Path | None = None, *, follows: str = "", on_progress: Tell | None = None
    ) -> State:
        """Train until validation says stop, or all steps are done; `best` is what it was best at.

        Args:
            checkpoint: written after every look, and gone on from where it is there; None writes none.
            follows: what the training follows from; a checkpoint of another one is not taken.

        Cost: a forward and backward pass a step, and a forward pass of the validation text a look.
        """
        if checkpoint and checkpoint.exists():
            self._restore(checkpoint, follows)
        options, state = self._schedule.train, self.state
        order = itertools.islice(batches(len(self._train), options), state.step, options.steps)
        for chosen in order:
            if state.worse >= self._schedule.patience:
                break
            state.losses.append(self._step([self._train[index] for index in chosen]))
            state.step += 1
            if state.step % self._schedule.check_every == 0 or state.step == options.steps:
                self._look()
                if checkpoint and self._accelerator.is_main_process:
                    self._save(checkpoint, follows)
            if on_progress:
                on_progress({"note": _note(state), "share": state.step / options.steps})
        return state

    def _step(self, batch: Sequence[Sample]) -> float:
        """One optimiser step; returns the mean loss of the whole batch, nats a token."""
        accelerator = self._accelerator
        own = batch[accelerator.process_index :: accelerator.num_processes]
        self._optimizer.zero_grad()
        summed = self._model(*padded(own, accelerator.device))
        tokens = max(1, sum(map(counted, batch)))
        # gradients of processes are averaged: each counts its sum N times over the tokens of all
        accelerator.backward(summed * (accelerator.num_processes / tokens))
        self._optimizer.step()
        return float(self._over_all(summed.detach())) / tokens

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean over the tokens of all users' validation text, nats a token; alike on every process."""
        accelerator = self._accelerator
        ordered = sorted(self._validation, key=lambda sample: len(sample[1]))
        parts = [ordered[start : start + _LOOK] for start in range(0, len(ordered), _LOOK)]
        model = self._model if self.sharded else self._pooled
        summed = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(parts), accelerator.num_processes):  # as many passes on every process
            place = first + accelerator.process_index
            loss = model(*padded(parts[min(place, len(parts) - 1)], accelerator.device))
            summed += loss.double().cpu() if place < len(parts) else 0.0
        return float(self._over_all(summed)) / max(1, sum(map(counted, ordered)))

    def pairs(self) -> dict[str, LoraPair]:
        """The factors as they are now; every process has to ask, since each may hold a part."""
        with self._gathered():
            return self._pooled.pairs()

    def _over_all(self, value: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor, self._accelerator.reduce(value.to(self._accelerator.device), reduction="sum")
        )

    def _gathered(self) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed  # noqa: PLC0415 - only where it was launched

        return deepspeed.zero.GatheredParameters([*self._pooled.side("A"), *self._pooled.side("B")])

    def _look(self) -> None:
        state, loss = self.state, self.validation_loss()
        if not math.isfinite(loss):
            raise AdapterError(
                f"step {state.step}: the validation loss is {loss}; take a smaller learning rate than"
                f" {self._schedule.train.learning_rate:g}"
            )
        if all(loss < before for _, before in state.looks):
            state.best, state.best_step = self.pairs(), state.step
        state.looks.append((state.step, loss))

    def _save(self, path: Path, follows: str) -> None:
        state = self.state
        values = {
            "follows": follows,
            "state": {name: getattr(state, name) for name in ("step", "losses", "looks", "best_step")},
            "pairs": _plain(self._pooled.pairs()),
            "best": _plain(state.best),
            "optimizer": self._optimizer.state_dict(),
        }
        with files.atomic_path(path) as temporary:
            torch.save(values, temporary)

    def _restore(self, path: Path, follows: str) -> None:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values["follows"] != follows:
            return
        self._pooled.load(_pairs(values["pairs"]))
        self._optimizer.load_state_dict(values["optimizer"])
        self.state = State(**values["state"], best=_pairs(values["best"]))


def _plain(pairs: Pairs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (pair.A, pair.B) for name, pair in pairs.items()}


def _pairs(values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, LoraPair]:
    return {name: LoraPair(A, B) for name, (A, B) in values.items()}


def _note(state: State) -> str:
    told = f"training: step {state.step}, loss {state.losses[-1]:.3f}"
    return f"{told}, validation {state.looks[-1][1]:.3f}" if state.looks else told
