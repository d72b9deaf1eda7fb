"""Target: how small or how exact a bundle has to be. One of three questions, or none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from soppu.errors import ConfigError

_BYTES_A_NUMBER = 2  # a ratio is against adapters kept in 16 bits a number


@dataclass(frozen=True)
class Target:
    """At most one of these is not zero.

    Attributes:
        ratio: bytes of the adapters at 16 bits a number, over bytes of the bundle file.
        max_bytes: size of the bundle file, at most.
        max_error: relative error of every user, at most.

    Raises:
        ConfigError: more than one is given, or one out of its range.
    """

    ratio: float = 0.0
    max_bytes: int = 0
    max_error: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "max_bytes", "max_error") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"compress: {' and '.join(given)} are given; a bundle has one target")
        for name in ("ratio", "max_bytes", "max_error"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"compress.{name} = {value!r}, allowed: a number of 0 or more")
            if value < 0 or (name == "max_error" and value >= 1):
                raise ConfigError(
                    f"compress.{name} = {value!r}, allowed: 0 (none) or above, an error below 1"
                )

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
            return size + (ratio(parameters, size + 1) >= self.ratio)
        return int(self.max_bytes)


def ratio(parameters: int, size: int) -> float:
    """How many times smaller a file is than the adapters at 16 bits a number."""
    return _BYTES_A_NUMBER * parameters / size
