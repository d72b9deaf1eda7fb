"""What the environment says about the plugin. Every variable is read here and nowhere else."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soppu.errors import ConfigError
from soppu.serve.bank.resident import DEFAULT_RESIDENT

MODELS_LIMIT = 10_000
KERNELS = ("auto", "native", "torch", "static")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings. A runtime adapter is one that is loaded beside a bundle, on its basis.

    `kernel` is "native" (compiled, CPU only), "torch", "static" (always on a GPU, where passes are recorded
    and replayed), or "auto": native where it can be built.
    """

    bundle: str | Path  # served from the start: a file, or a registry, of which what is published
    state: Path  # the folder that keeps what is published here; one below it for each server
    max_error: float | None = None  # relative, of a runtime adapter; None: the bundle's worst user's
    spare_rows: int = 64  # runtime adapters a bundle version has room for
    resident_mib: int = DEFAULT_RESIDENT >> 20  # of users that stay in a worker's memory
    read_ahead: bool = True  # so many of them before they ask
    kernel: str = "auto"
    admin_token: str = ""  # asked for by the admin routes; "" closes them
    models_limit: int = MODELS_LIMIT  # names in /v1/models, where a request asks for no other number
    follow: str = ""  # a registry whose publications this server takes over; "" is none
    follow_url: str = ""  # those to this server alone; "" is all
    follow_seconds: float = 10.0  # between two looks at it

    @property
    def registry(self) -> str:
        """The registry that `bundle` names; "" where it is a file."""
        return "" if isinstance(self.bundle, Path) else self.bundle


def read(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`. Raises ConfigError naming the variable, its value and those allowed."""
    follow = environment.get("SOPPU_FOLLOW", "")
    bundle = _bundle(environment.get("SOPPU_BUNDLE") or follow)
    kernel = environment.get("SOPPU_KERNEL", "auto")
    if kernel not in KERNELS:
        raise ConfigError(f"SOPPU_KERNEL={kernel!r}: allowed are {', '.join(KERNELS)}")
    seconds = _number("SOPPU_FOLLOW_SECONDS", environment.get("SOPPU_FOLLOW_SECONDS") or "10")
    if not 0.1 <= seconds <= 86_400:
        raise ConfigError(f"SOPPU_FOLLOW_SECONDS={seconds}: seconds between 0.1 and 86400 are needed")
    return Settings(
        bundle=bundle,
        state=_state(environment, bundle),
        max_error=_error(environment.get("SOPPU_MAX_ERROR", "")),
        spare_rows=_whole(environment, "SOPPU_SPARE_ROWS", 64, least=0),
        resident_mib=_whole(environment, "SOPPU_RESIDENT_MIB", Settings.resident_mib, least=0),
        read_ahead=_flag(environment, "SOPPU_READ_AHEAD", Settings.read_ahead),
        kernel=kernel,
        admin_token=environment.get("SOPPU_ADMIN_TOKEN", ""),
        models_limit=_whole(environment, "SOPPU_MODELS_LIMIT", MODELS_LIMIT, least=1),
        follow=follow,
        follow_url=environment.get("SOPPU_FOLLOW_URL", ""),
        follow_seconds=seconds,
    )


def _bundle(named: str) -> str | Path:
    path = Path(named).expanduser()
    if path.is_file():
        return path.resolve()
    if "://" in named:
        return named
    if path.is_dir():
        return str(path.resolve())
    raise ConfigError(
        f"SOPPU_BUNDLE: no such file or registry: {str(path)!r}; unset it to start without the plugin"
    )


def _state(environment: Mapping[str, str], bundle: str | Path) -> Path:
    """The folder named, or one of this bundle's in the user's state folder."""
    if given := environment.get("SOPPU_STATE", ""):
        return Path(given).expanduser().absolute()
    home = environment.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "soppu", "vllm", hashlib.sha256(str(bundle).encode()).hexdigest()[:16])


def _error(text: str) -> float | None:
    if not text:
        return None
    value = _number("SOPPU_MAX_ERROR", text)
    if not 0 <= value <= 1:
        raise ConfigError(f"SOPPU_MAX_ERROR={text!r}: a relative error between 0 and 1 is needed")
    return value


def _whole(environment: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = environment.get(name, str(default))
    if not (text.isdecimal() and int(text) >= least):
        raise ConfigError(f"{name}={text!r}: a whole number, {least} or more, is needed")
    return int(text)


def _flag(environment: Mapping[str, str], name: str, default: bool) -> bool:
    text = environment.get(name, str(int(default)))
    if text not in ("0", "1"):
        raise ConfigError(f"{name}={text!r}: allowed are 0 and 1")
    return text == "1"


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ConfigError(f"{name}={text!r}: a number is needed")
    return value
