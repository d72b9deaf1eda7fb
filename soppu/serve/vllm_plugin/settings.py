"""What the environment says about the plugin. Every variable is read here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soppu.compress.bundle.shelf import Shelf
from soppu.errors import ConfigError
from soppu.serve.bank.resident import DEFAULT_RESIDENT

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
    resident_mib: int = DEFAULT_RESIDENT >> 20  # of users that stay in a worker's memory
    kernel: str = "auto"
    admin_token: str = ""  # asked for by the admin routes; "" closes them

    def read_bundle(self) -> Shelf:
        """The bundle served from the start. Raises BundleError for a damaged one."""
        return Shelf.open(self.bundle)


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
    whole = {"SOPPU_SPARE_ROWS": Settings.spare_rows, "SOPPU_RESIDENT_MIB": Settings.resident_mib}
    for name, default in whole.items():
        if not (text := environment.get(name, str(default))).isdecimal():
            raise ConfigError(f"{name}={text!r}: a whole number, 0 or more, is needed")
        whole[name] = int(text)
    return Settings(
        bundle=bundle.resolve(),
        max_error=_error(environment.get("SOPPU_MAX_ERROR", "")),
        spare_rows=whole["SOPPU_SPARE_ROWS"],
        resident_mib=whole["SOPPU_RESIDENT_MIB"],
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
