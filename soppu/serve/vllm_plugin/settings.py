"""What the environment says about the plugin. Every variable is read here and nowhere else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soppu.compress.bundle.bundle import Bundle
from soppu.errors import ConfigError

KERNELS = ("auto", "native", "torch", "static")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings. A runtime adapter is one that is loaded beside a bundle, on its basis.

    `kernel` is "native" (compiled, CPU only), "torch", "static" (always on a GPU, where passes are recorded
    and replayed), or "auto": native where it can be built.
    """

    bundle: Path  # the bundle file served from the start
    max_error: float | None = None  # relative, of a runtime adapter; None: the bundle's worst user's
    spare_rows: int = 64  # runtime adapters a bundle version has room for
    kernel: str = "auto"
    admin_token: str = ""  # asked for by the admin routes; "" closes them

    def read_bundle(self) -> tuple[Bundle, str]:
        """The bundle served from the start, and its id. Raises BundleError for a damaged one."""
        data = self.bundle.read_bytes()
        return Bundle.from_bytes(data, source=str(self.bundle)), hashlib.sha256(data).hexdigest()


def read(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`. Raises ConfigError naming the variable, its value and those allowed."""
    bundle = Path(environment["SOPPU_BUNDLE"]).expanduser()
    if not bundle.is_file():
        raise ConfigError(
            f"SOPPU_BUNDLE: no such file: {str(bundle)!r}; unset it to start without the plugin"
        )
    kernel = environment.get("SOPPU_KERNEL", "auto")
    if kernel not in KERNELS:
        raise ConfigError(f"SOPPU_KERNEL={kernel!r}: allowed are {', '.join(KERNELS)}")
    rows = environment.get("SOPPU_SPARE_ROWS", "64")
    if not rows.isdecimal():
        raise ConfigError(f"SOPPU_SPARE_ROWS={rows!r}: a whole number, 0 or more, is needed")
    return Settings(
        bundle=bundle.resolve(),
        max_error=_error(environment.get("SOPPU_MAX_ERROR", "")),
        spare_rows=int(rows),
        kernel=kernel,
        admin_token=environment.get("SOPPU_ADMIN_TOKEN", ""),
    )


def _error(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"SOPPU_MAX_ERROR={text!r}: a relative error between 0 and 1 is needed")
    return value
