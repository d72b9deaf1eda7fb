"""CompressOptions: what to compress with, and Target: what a bundle has to reach.

Methods, ranges and defaults are those of `soppu.config.CompressSettings`. Not for how any one method works.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, field_validator

from soppu.config import CALIBRATION, CompressConfig, CompressSettings, one_target
from soppu.devices import torch_device
from soppu.settings import Amount, Natural, Seed, settings

DEFAULT_RATIO = 16.0  # of methods that need a target and were given none
_BYTES_A_NUMBER = 2  # a ratio is against adapters kept in 16 bits a number


@settings("compress")
class Target:
    """At most one of these is not zero; ConfigError for more, or one out of its range."""

    ratio: Amount = 0.0  # bytes of the adapters at 16 bits a number, over bytes of the bundle file
    max_bytes: Natural = 0  # size of the bundle file
    max_error: Annotated[Amount, Field(lt=1)] = 0.0  # relative error of every user

    _one_target = field_validator("max_bytes", "max_error")(one_target)

    def __bool__(self) -> bool:
        return bool(self.ratio or self.max_bytes or self.max_error)

    def __str__(self) -> str:
        if self.max_error:
            return f"relative error {self.max_error:g} for every user"
        return f"{self.ratio:g}x" if self.ratio else f"{self.max_bytes} bytes" if self.max_bytes else ""

    def most_bytes(self, parameters: int) -> int:
        """Bytes the file may have, 0 where the target is an error or there is none."""
        if self.ratio:
            size = int(_BYTES_A_NUMBER * parameters / self.ratio)
            # the quotient may have been rounded to just below a whole number
            return max(1, size + (ratio(parameters, size + 1) >= self.ratio))  # 0 would be no target
        return self.max_bytes


def ratio(parameters: int, size: int) -> float:
    """How many times smaller a file is than the adapters at 16 bits a number."""
    return _BYTES_A_NUMBER * parameters / size


@settings("compress")
class CompressOptions(CompressSettings):
    """How a set of adapters becomes a bundle.

    "residual" shares a basis where that pays and gives every user numbers of their own where it does not;
    "svd" shares nothing; "joint" keeps cores in one shared basis, "joint-diag" diagonal ones, "cluster" cores
    in one of several bases; "ternary" is ComPEFT. At most one target may be given; residual, svd and ternary
    take a size; a ratio of 16 is taken where residual and svd are given no target.

    Raises:
        ConfigError: a value outside its range; the message lists every fault.
    """

    seed: Seed = 0  # of sketches and of cluster starts

    @classmethod
    def of(cls, config: CompressConfig, *, seed: int = 0) -> Self:
        """What a run's configuration asks for."""
        return cls(
            **{name: value for name, value in vars(config).items() if name not in CALIBRATION}, seed=seed
        )

    @property
    def target(self) -> Target:
        """What the bundle has to reach."""
        given = Target(ratio=self.ratio, max_bytes=self.max_bytes, max_error=self.max_error)
        needs = self.method in ("residual", "svd")
        return Target(ratio=DEFAULT_RATIO) if needs and not given else given

    def torch_device(self) -> torch.device:
        """The device to compute on. Raises ConfigError where CUDA is asked for and absent."""
        return torch_device(self.device, key="compress.device")
