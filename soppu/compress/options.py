"""CompressOptions: what to compress with. Not for how any one method works."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from soppu.compress.numbers.quantise import COORDS, FLOATS, QUANTISERS
from soppu.compress.target import Target
from soppu.errors import ConfigError

METHODS = ("residual", "svd", "joint", "joint-diag", "cluster", "ternary")
SHARED_METHODS = ("joint", "joint-diag", "cluster")  # all of a user is coordinates in a basis
BASIS_BITS = (*QUANTISERS, *FLOATS)
CORE_BITS = (*COORDS, *FLOATS)
DEFAULT_RATIO = 16.0  # of methods that need a target and were given none
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class CompressOptions:
    """How a set of adapters becomes a bundle.

    Attributes:
        method: "residual" shares a basis where that pays and gives every user numbers of their own where it
            does not; "svd" shares nothing; "joint" keeps cores in one shared basis, "joint-diag" diagonal
            ones, "cluster" cores in one of several bases; "ternary" is ComPEFT.
        rank: largest shared rank; joint methods use it as it is where there is no target.
        ratio: target: bytes at 16 bits a number over bytes of the file. At most one target may be given;
            residual, svd and ternary take a ratio of 16 where there is none.
        max_bytes: target: size of the file, at most.
        max_error: target: relative error of every user, at most. For residual, svd, joint and cluster.
        clusters: bases a module has, method "cluster" alone.
        basis_bits: bits of basis numbers in joint methods; 16 and 32 are floats.
        core_bits: bits of core numbers in joint methods; 16 and 32 are floats.
        density: share of numbers "ternary" keeps where there is no target.
        alpha: factor on the scale of "ternary", as in ComPEFT.
        faithful: whether "ternary" follows the released code to the letter, one global threshold and scale.
        max_steps: most alternations of a joint fit once its ranges are found; 0 keeps the closed form.
        tolerance: stop when two steps in a row gain less than this share of the total energy.
        shrink: how far calibration moments are drawn towards white input; used where moments are given.
        seed: of sketches and of cluster starts. Recorded in the report.
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: a value outside its range; the message lists every fault.
    """

    method: str = "residual"
    rank: int = 64
    ratio: float = 0.0
    max_bytes: int = 0
    max_error: float = 0.0
    clusters: int = 1
    basis_bits: int = 8
    core_bits: int = 8
    density: float = 0.1
    alpha: float = 1.0
    faithful: bool = False
    max_steps: int = 10
    tolerance: float = 1e-5
    shrink: float = 0.05
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = (
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("rank", _whole(self.rank, 1), "an integer of 1 or more"),
            ("clusters", _whole(self.clusters, 1), "an integer of 1 or more"),
            ("basis_bits", self.basis_bits in BASIS_BITS, f"one of {', '.join(map(str, BASIS_BITS))}"),
            ("core_bits", self.core_bits in CORE_BITS, f"one of {', '.join(map(str, CORE_BITS))}"),
            ("density", _share(self.density, above=True, one=True), "a number above 0, at most 1"),
            ("alpha", _number(self.alpha) and self.alpha > 0, "a number above 0"),
            ("faithful", isinstance(self.faithful, bool), "true or false"),
            ("max_steps", _whole(self.max_steps, 0), "an integer of 0 or more"),
            ("tolerance", _share(self.tolerance), "a number from 0 up to, not including, 1"),
            ("shrink", _share(self.shrink, above=True, one=True), "a number above 0, at most 1"),
            ("seed", _whole(self.seed, 0), "an integer of 0 or more"),
            ("device", _device(self.device), "auto, cpu, cuda or cuda:N"),
        )
        faults = [
            f"compress.{name} = {getattr(self, name)!r}, allowed: {allowed}"
            for name, good, allowed in checks
            if not good
        ]
        if self.method != "cluster" and self.clusters != 1:
            faults.append(f"compress.clusters = {self.clusters!r}: only the method cluster has more than one")
        if self.max_error and self.method in ("ternary", "joint-diag"):
            faults.append(f"compress.max_error: the method {self.method} has no such target")
        if faults:
            raise ConfigError("; ".join(faults))
        self.target  # noqa: B018  raises what is wrong with it

    @property
    def target(self) -> Target:
        """What the bundle has to reach."""
        given = Target(ratio=self.ratio, max_bytes=self.max_bytes, max_error=self.max_error)
        needs = self.method in ("residual", "svd")
        return Target(ratio=DEFAULT_RATIO) if needs and not given else given

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


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: object, *, above: bool = False, one: bool = False) -> bool:
    if not _number(value):
        return False
    share = float(value)  # type: ignore[arg-type]
    return (share > 0 if above else share >= 0) and (share <= 1 if one else share < 1)


def _device(value: object) -> bool:
    return isinstance(value, str) and _DEVICE.fullmatch(value) is not None
