"""The configuration of a run: frozen dataclasses read from TOML, checked as a whole.

A file holds only what differs from the defaults below; `configs/default.toml` lists every key with its
meaning. Unknown keys, wrong types and values out of range are collected and reported in one ConfigError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from soppu.compress.options import SHARED_METHODS, CompressOptions
from soppu.errors import ConfigError


def _key(
    default: Any, *, low: float | None = None, high: float | None = None, one_of: tuple[Any, ...] = ()
) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "one_of": one_of})


@dataclass(frozen=True)
class BaseConfig:
    """Which language model everybody shares."""

    model: str = "smollm2-135m"
    cache: str = ".soppu/models"


@dataclass(frozen=True)
class DataConfig:
    """Where users' text comes from, and how much of it is used."""

    source: str = "stdlib"
    users: tuple[str, ...] = ()
    train_examples: int = _key(64, low=1)
    heldout_examples: int = _key(16, low=1)
    min_examples: int = _key(8, low=1)
    max_tokens: int = _key(192, low=16, high=32768)


@dataclass(frozen=True)
class PlanConfig:
    """The FedBiOT split: the last layers are the adapter, the rest is thinned to the emulator."""

    adapter_layers: int = _key(4, low=1)
    drop_ratio: float = _key(0.2, low=0.0, high=0.9)


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA every user trains."""

    rank: int = _key(8, low=1, high=512)
    alpha: float = _key(16.0, low=1e-6)
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlignConfig:
    """The server's distillation of the emulator towards the full model, on public text."""

    source: str = "stdlib-public"
    examples: int = _key(64, low=1)
    warmup_steps: int = _key(60, low=0)
    round_steps: int = _key(5, low=0)
    batch_size: int = _key(4, low=1)
    max_tokens: int = _key(128, low=16)
    rank: int = _key(8, low=1)
    learning_rate: float = _key(3e-4, low=0.0)
    kl_weight: float = _key(0.05, low=0.0)


@dataclass(frozen=True)
class FederationConfig:
    """Shared FedAvg rounds, then one personal round in which each user's own adapter comes back."""

    rounds: int = _key(3, low=0)
    local_steps: int = _key(10, low=1)
    personal_steps: int = _key(30, low=1)
    batch_size: int = _key(4, low=1)
    learning_rate: float = _key(1e-3, low=0.0)
    personal_learning_rate: float = _key(1e-3, low=0.0)
    prox_weight: float = _key(1e-3, low=0.0)
    wire: str = _key("float32", one_of=("float32", "ternary"))
    wire_density: float = _key(0.2, low=1e-6, high=1.0)
    wire_max_loss: float = _key(0.01, low=0.0)
    client_cpus: int = _key(1, low=1)
    min_users: int = _key(0, low=0)
    timeout_s: int = _key(3600, low=1)


# Keys of [federation] that change how a run is carried out, not what comes out of it.
OPERATIONAL = frozenset({"client_cpus", "min_users", "timeout_s"})


# What a bundle can be asked for, one at a time; a target that is given replaces the default one.
TARGETS = ("ratio", "max_bytes", "max_error")
# Keys of [compress] that decide what errors are weighed by; the others are those of CompressOptions.
CALIBRATION = frozenset({"whiten", "calibration_examples"})


@dataclass(frozen=True)
class CompressConfig:
    """The compression of all adapters into one bundle; `soppu.compress.CompressOptions` explains the keys."""

    method: str = _key("residual", one_of=("residual", "svd", "joint", "joint-diag", "cluster", "ternary"))
    rank: int = _key(64, low=1)
    ratio: float = _key(16.0, low=0.0)
    max_bytes: int = _key(0, low=0)
    max_error: float = _key(0.0, low=0.0)
    clusters: int = _key(1, low=1)
    basis_bits: int = _key(8, one_of=(2, 3, 4, 5, 6, 8, 16, 32))
    core_bits: int = _key(8, one_of=(4, 6, 8, 16, 32))
    density: float = _key(0.1, low=0.0, high=1.0)
    alpha: float = _key(1.0, low=0.0)
    faithful: bool = False
    max_steps: int = _key(10, low=0)
    tolerance: float = _key(1e-5, low=0.0)
    shrink: float = _key(0.05, low=0.0, high=1.0)
    device: str = "auto"
    whiten: bool = False
    calibration_examples: int = _key(32, low=1)

    def options(self, *, seed: int = 0) -> CompressOptions:
        """The same for the library. Raises ConfigError for values that do not go together."""
        values = {name: value for name, value in vars(self).items() if name not in CALIBRATION}
        return CompressOptions(**values, seed=seed)


@dataclass(frozen=True)
class GateConfig:
    """What a bundle must reach before it may be published."""

    min_mean_gain_kept: float = _key(0.9, low=-10.0, high=1.0)
    min_user_gain_kept: float = _key(0.5, low=-10.0, high=1.0)
    max_relative_error: float = _key(0.7, low=0.0)
    min_improved_users: float = _key(1.0, low=0.0, high=1.0)


@dataclass(frozen=True)
class ServeConfig:
    """The serving target bundles are pushed to."""

    target: str = _key("embedded", one_of=("embedded", "vllm"))
    url: str = "http://127.0.0.1:8099"
    state: str = ".soppu/serve"
    vllm_python: str = ".venv-vllm/bin/python"
    vllm_options: tuple[str, ...] = ("--gpu-memory-utilization", "0.5")
    max_batch: int = _key(16, low=1)
    canary_prompt: str = "def main():"
    canary_tokens: int = _key(4, low=1)
    completion_tokens: int = _key(24, low=1)
    start_timeout_s: int = _key(600, low=1)


@dataclass(frozen=True)
class RegistryConfig:
    """Where adapters, bundles and the catalogue of them are kept."""

    root: str = ".soppu/registry"
    catalogue: str = ""


@dataclass(frozen=True)
class Config:
    """One run. `seed` fixes every random choice; `runs` is the folder reports are written to."""

    seed: int = _key(0, low=0)
    runs: str = "runs"
    frozen_dtype: str = _key("float32", one_of=("float32", "bfloat16"))
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    plan: PlanConfig = PlanConfig()
    lora: LoraSettings = LoraSettings()
    align: AlignConfig = AlignConfig()
    federation: FederationConfig = FederationConfig()
    compress: CompressConfig = CompressConfig()
    gate: GateConfig = GateConfig()
    serve: ServeConfig = ServeConfig()
    registry: RegistryConfig = RegistryConfig()

    def training_digest(self) -> str:
        """Hash (16 hex) of what decides which adapters come out; not of where it runs or what comes after."""
        values = dataclasses.asdict(self)
        federation = {k: v for k, v in values["federation"].items() if k not in OPERATIONAL}
        sections = {name: values[name] for name in ("seed", "frozen_dtype", "data", "plan", "lora", "align")}
        chosen = {**sections, "model": self.base.model, "federation": federation}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def digest(self, *sections: str) -> str:
        """Hash (16 hex) of the named sections, or of everything; the same settings give the same digest."""
        values = dataclasses.asdict(self)
        chosen = {name: values[name] for name in sections} if sections else values
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file into a Config.

    Args:
        path: the file.
        overrides: values that win over the file's, keyed `"section.key"`.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds faults; all of them are listed.
    """
    source = Path(path)
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None
    for name, value in (overrides or {}).items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {name}: {section} is a value, not a table")
        place[key] = value
    return from_dict(values, source=str(source))


def from_dict(values: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Build a Config from nested mappings; ConfigError lists every fault with its key."""
    faults: list[str] = []
    config = _build(Config, _with_given_target(values), "", faults)
    if not faults:
        _cross_check(config, faults)
    if faults:
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; `from_dict(to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: Config) -> str:
    """TOML text that `load` reads back to an equal Config."""
    values = to_dict(config)
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables]
    for table, entries in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in entries.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # TOML knows no surrogate pairs, which JSON's \u escapes would give, and no bare DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _build(cls: type[Any], values: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in sorted(set(values) - fields.keys()):
        faults.append(f"unknown key {prefix}{name!s}; {prefix or 'top level'} knows: {', '.join(fields)}")
    chosen = {}
    for name in fields.keys() & values.keys():
        hint, value, label = hints[name], values[name], prefix + name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                chosen[name] = _build(hint, value, f"{label}.", faults)
            else:
                faults.append(f"{label}: expected a table, found {value!r}")
        else:
            chosen[name] = _checked(value, hint, fields[name].metadata, label, faults)
    return cls(**chosen)


def _checked(value: Any, hint: Any, rules: Mapping[str, Any], label: str, faults: list[str]) -> Any:
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        if isinstance(value, list | tuple) and all(isinstance(item, inner) for item in value):
            return tuple(value)
        faults.append(f"{label}: expected a list of {inner.__name__}, found {value!r}")
        return ()
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        faults.append(f"{label}: expected {hint.__name__}, found {value!r}")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{label}: found {value}, expected a finite number")
    if rules.get("one_of") and value not in rules["one_of"]:
        faults.append(f"{label}: found {value!r}, allowed: {', '.join(map(str, rules['one_of']))}")
    for bound, wrong in (("low", lambda x, y: x < y), ("high", lambda x, y: x > y)):
        limit = rules.get(bound)
        if limit is not None and wrong(value, limit):
            faults.append(f"{label}: found {value!r}, {'at least' if bound == 'low' else 'at most'} {limit}")
    return value


def _cross_check(config: Config, faults: list[str]) -> None:
    if config.data.min_examples > config.data.train_examples:
        faults.append(
            f"data.min_examples: found {config.data.min_examples}, at most data.train_examples"
            f" = {config.data.train_examples}"
        )
    if not config.serve.url.startswith(("http://", "https://")):
        faults.append(f"serve.url: found {config.serve.url!r}, expected http://host:port")
    if config.serve.target == "vllm" and config.compress.method not in SHARED_METHODS:
        faults.append(
            f"serve.target: vllm serves cores in shared bases; compress.method = {config.compress.method!r}"
            f" keeps more; allowed with it: {', '.join(SHARED_METHODS)}"
        )
    faults += _compress_faults(config.compress)


def _with_given_target(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, and no default ratio for a bundle that is given another target."""
    section = values.get("compress")
    if not isinstance(section, Mapping) or "ratio" in section or not section.keys() & set(TARGETS):
        return values
    given = any(section.get(name) for name in TARGETS)
    return {**values, "compress": {**section, "ratio": 0.0}} if given else values


def _compress_faults(settings: CompressConfig) -> list[str]:
    """What is wrong with [compress] as a whole: its targets, and whatever CompressOptions refuses."""
    faults = []
    given = [name for name in TARGETS if getattr(settings, name)]
    if len(given) > 1:
        found = ", ".join(f"compress.{name} = {getattr(settings, name)!r}" for name in given)
        faults.append(f"{found}: a bundle has one target, the others are 0")
        others: dict[str, Any] = dict.fromkeys(given[:-1], 0)
        settings = dataclasses.replace(settings, **others)
    try:
        settings.options()
    except ConfigError as error:
        faults += str(error).split("; ")
    return faults
