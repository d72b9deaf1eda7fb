"""CompressOptions: what to compress with. Not for how any one method works."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from soppu.errors import ConfigError

METHODS = ("joint",)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class CompressOptions:
    """How a set of adapters becomes a bundle.

    Attributes:
        method: name of the method; "joint" is one shared basis for all users.
        rank: k asked for. A module uses min(k, i, o, sum of its ranks); the report says how much.
        max_steps: most alternations after the closed-form start; 0 keeps the start.
        tolerance: stop when two steps in a row gain less than this share of the total energy.
        seed: for methods that draw random numbers; "joint" draws none. Recorded in the report.
        dtype: how bases and cores are stored: "float16", "bfloat16" or "float32".
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: a value outside its range; the message lists every fault.
    """

    method: str = "joint"
    rank: int = 32
    max_steps: int = 10
    tolerance: float = 1e-5
    seed: int = 0
    dtype: str = "float16"
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = (
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("rank", _whole(self.rank, 1), "an integer of 1 or more"),
            ("max_steps", _whole(self.max_steps, 0), "an integer of 0 or more"),
            ("tolerance", _share(self.tolerance), "a number from 0 up to, not including, 1"),
            ("seed", _whole(self.seed, 0), "an integer of 0 or more"),
            ("dtype", self.dtype in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
            ("device", _device(self.device), "auto, cpu, cuda or cuda:N"),
        )
        faults = [
            f"compress.{name} = {getattr(self, name)!r}, allowed: {allowed}"
            for name, good, allowed in checks
            if not good
        ]
        if faults:
            raise ConfigError("; ".join(faults))

    def torch_dtype(self) -> torch.dtype:
        """The storage type as torch names it."""
        return DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """The device to compute on. Raises ConfigError where CUDA is asked for and absent."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ConfigError(f"compress.device = {self.device!r}, this machine has {found} CUDA devices")
        return device


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _share(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value < 1


def _device(value: object) -> bool:
    return isinstance(value, str) and _DEVICE.fullmatch(value) is not None
