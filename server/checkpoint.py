"""What the federation remembers between attempts: the last round's tensors, and what happened so far.

One safetensors file for tensors and one JSON file naming it; the JSON is written last, so it never names
tensors that are not there. A checkpoint of another configuration or plan is ignored by its key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from soppu import files
from soppu.config import FederationConfig
from soppu.federation import wire

STATE = "checkpoint.json"
WARM_UP = 0.1  # share of a federation that ends as the first round begins


@dataclass
class Checkpoint:
    """State after `done` rounds (-1: nothing yet, 0: the emulator is aligned).

    Attributes:
        key: identity of the run; a file with another key is not used.
        done: rounds finished.
        tensors: the shared LoRA, in wire names.
        notes: JSON-able record of the rounds so far.
        aligner: state of the aligner, the emulator's LoRA among it.
    """

    key: str
    done: int = -1
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    aligner: dict[str, Tensor] = field(default_factory=dict)


def load(folder: Path, *, key: str) -> Checkpoint:
    """The last checkpoint of this run, or an empty one."""
    path = folder / STATE
    if not path.exists():
        return Checkpoint(key)
    values = json.loads(path.read_text())
    if values["key"] != key:
        return Checkpoint(key)
    tensors, aligner = wire.split_state(load_file(folder / values["tensors"]))
    return Checkpoint(key, values["done"], tensors, values["notes"], aligner)


def store(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one before stays valid until this one is whole."""
    name = f"round-{checkpoint.done:04d}.safetensors"
    aligner = {f"{wire.EMULATOR}{key}": value for key, value in checkpoint.aligner.items()}
    tensors = {key: value.contiguous() for key, value in {**checkpoint.tensors, **aligner}.items()}
    files.write_bytes(folder / name, save(tensors))
    files.write_text(
        folder / STATE,
        json.dumps(
            {"key": checkpoint.key, "done": checkpoint.done, "tensors": name, "notes": checkpoint.notes}
        ),
    )
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


@dataclass(frozen=True)
class RoundShare:
    """How much of a federation lies behind it in the middle of a round.

    Attributes:
        round: from 1; `rounds` is how many there will be at most, the personal one the last of them.
        before: share of everything that is done when the round begins.
        whole: share of everything that the round is.
    """

    round: int
    rounds: int
    before: float
    whole: float
    name: str = "round"

    @classmethod
    def even(cls, number: int, last: int, *, name: str) -> RoundShare:
        """Round `number` of `last` that are alike, and all there is."""
        return cls(number, last, (number - 1) / last, 1 / last, name)

    @classmethod
    def of(cls, number: int, last: int, settings: FederationConfig) -> RoundShare:
        """Round `number` of `last`, by the steps that users may train in each; the warm-up is a tenth."""
        personal = settings.personal_steps * len(settings.personal_learning_rates)
        steps = [settings.local_steps] * (last - 1) + [personal]
        unit = 0.9 / max(1, sum(steps))
        return cls(number, last, WARM_UP + unit * sum(steps[: number - 1]), unit * steps[number - 1])

    def share(self, heard: float) -> float:
        """Of everything, once this share of the users has answered."""
        return self.before + heard * self.whole


def write_progress(folder: Path, values: Mapping[str, Any]) -> None:
    """Say how far the run is, for whoever polls the folder."""
    files.write_text(folder / "progress.json", json.dumps(dict(values)))
