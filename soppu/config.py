"""The configuration of a run: frozen dataclasses read from TOML, checked as a whole.

A file holds only what differs from the defaults below; `configs/default.toml` lists every key with its
meaning. Unknown keys, wrong types and values out of range are collected and reported in one ConfigError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import ArgsKwargs

from soppu.basis_settings import BasisConfig
from soppu.data_settings import DataConfig
from soppu.errors import ConfigError
from soppu.settings import (
    Amount,
    Count,
    Device,
    Flag,
    Natural,
    Real,
    Seed,
    Texts,
    Whole,
    allowed,
    build,
    settings,
    toml,
)
from soppu.sharing import OPERATIONAL, SharingSettings, of_the_form
from soppu.tradeoff_settings import EvaluateConfig, check_rules


@settings("base")
class BaseConfig:
    """Which language model everybody shares."""

    model: str = "smollm2-135m"
    cache: str = ".soppu/models"


@settings("plan")
class PlanConfig:
    """The FedBiOT split: the last layers are the adapter, the rest is thinned to the emulator."""

    adapter_layers: Count = 4
    drop_ratio: Annotated[Real, Field(ge=0.0, le=0.9)] = 0.2


@settings("lora")
class LoraSettings:
    """The LoRA every user trains."""

    rank: Annotated[Whole, Field(ge=1, le=512)] = 8
    alpha: Annotated[Real, Field(ge=1e-6)] = 16.0
    target_modules: Texts = ()


@settings("align")
class AlignConfig:
    """The server's distillation of the emulator towards the full model, on public text."""

    source: str = "stdlib-public"
    examples: Count = 64
    warmup_steps: Natural = 60
    round_steps: Natural = 5
    batch_size: Count = 4
    max_tokens: Annotated[Whole, Field(ge=16)] = 128
    rank: Count = 8
    learning_rate: Amount = 3e-4
    kl_weight: Amount = 0.05
    device: Device = "auto"


Share = Annotated[Real, Field(gt=0, le=1)]


@settings("federation")
class FederationConfig(SharingSettings):
    """Shared rounds, then one personal round in which each user's own adapter comes back."""

    rounds: Natural = 3
    patience: Count = 2
    local_steps: Count = 10
    batch_size: Count = 4
    learning_rate: Amount = 1e-3
    personal_steps: Count = 60
    personal_check_every: Count = 10
    personal_patience: Count = 2
    personal_learning_rates: Annotated[tuple[Amount, ...], Field(min_length=1)] = (1e-3,)
    personal_shares: tuple[Share, ...] = (0.5, 0.75)
    prox_weight: Amount = 1e-3
    wire: Literal["float32", "ternary"] = "float32"
    wire_density: Annotated[Real, Field(ge=1e-6, le=1.0)] = 0.2
    wire_max_loss: Amount = 0.01
    max_update: Annotated[Real, Field(ge=1.0)] = 10.0  # a user's change, over the median change of the round
    client_cpus: Count = 1
    client_gpus: Amount = 0.0
    client_device: Device = "auto"
    min_users: Natural = 0
    hello_timeout_s: Count = 120  # how long those who are missing are waited for
    round_timeout_s: Count = 900  # a client that has not answered by then has lost its place in the round
    timeout_s: Count = 3600
    connection: str = ""  # of Flower's configuration: a SuperLink with nodes of its own; "" simulates them
    members: str = ""
    edition: str = ""

    @model_validator(mode="after")
    def _as_they_are(self) -> Self:
        if self.form != "lora" and self.wire != "float32":
            words = f"in the form {self.form} cores are sent as they are"
            raise ValueError(self._refused("wire", "'float32'", words))
        return self


# What a bundle can be asked for, one at a time; a target that is given replaces the default one.
TARGETS = ("ratio", "max_bytes", "max_error")
Method = Literal["residual", "svd", "joint", "joint-diag", "cluster", "ternary"]
METHODS: tuple[str, ...] = get_args(Method)
SHARED_METHODS = ("joint", "joint-diag", "cluster")  # all of a user is coordinates in a basis
BasisBits = Literal[2, 3, 4, 5, 6, 8, 16, 32]
CoreBits = Literal[4, 6, 8, 16, 32]
# Keys of [compress] that decide what errors are weighed by; the others are those of the library.
CALIBRATION = frozenset({"whiten", "calibration_examples"})


def one_target(value: float, info: ValidationInfo) -> float:
    """Refuses a second target; for fields that come after other targets."""
    given = {name: info.data[name] for name in TARGETS if info.data.get(name)} | {str(info.field_name): value}
    if value and len(given) > 1:
        found = ", ".join(f"compress.{name} = {other!r}" for name, other in given.items())
        names = " and ".join(given)
        raise ValueError(f"{found}: a bundle has one target, the others are 0; {names} are given")
    return value


@settings("compress")
class CompressSettings:
    """What the library, its command and a configuration all know of a compression, in one place.

    Defaults are those of the library and the command; the texts are the command's help.
    """

    method: Annotated[Method, "See above."] = "residual"
    rank: Annotated[Count, "Largest shared rank k; without a target, the rank of the joint methods."] = 64
    ratio: Annotated[Amount, "Target: how many times smaller than at 16 bits."] = 0.0
    max_bytes: Annotated[Natural, "Target: bytes of the bundle file, at most."] = 0
    max_error: Annotated[Amount, Field(lt=1), "Target: relative error of every user, at most."] = 0.0
    clusters: Annotated[Count, "Bases a module has; cluster."] = 1
    basis_bits: Annotated[BasisBits, "Bits of basis numbers, 2 to 8, 16 or 32; joint methods."] = 8
    core_bits: Annotated[CoreBits, "Bits of core numbers: 4, 6, 8, 16 or 32; joint methods."] = 8
    density: Annotated[Share, "Share of numbers kept without a target; ternary."] = 0.1
    alpha: Annotated[Real, Field(gt=0), "Factor on the scale; ternary."] = 1.0
    faithful: Annotated[Flag, "ComPEFT as published, one scale an adapter; ternary."] = False
    max_steps: Annotated[Natural, "Most alternations of a joint fit once its ranges are found."] = 10
    tolerance: Annotated[Amount, Field(lt=1), "Stop when two steps in a row gain less than this."] = 1e-5
    shrink: Annotated[Share, "How far calibration moments are drawn towards white input."] = 0.05
    device: Annotated[Device, "auto, cpu, cuda or cuda:N."] = "auto"

    _one_target = field_validator("max_bytes", "max_error")(one_target)

    @field_validator("max_error", "clusters")
    @classmethod
    def _of_the_method(cls, value: float, info: ValidationInfo) -> float:
        name, method = info.field_name, info.data.get("method")
        if name == "max_error" and value and method in ("ternary", "joint-diag"):
            raise ValueError(f"compress.max_error = {value!r}: the method {method} has no such target")
        if name == "clusters" and value != 1 and method and method != "cluster":
            raise ValueError(f"compress.clusters = {value!r}: only the method cluster has more than one")
        return value


@settings("compress")
class CompressConfig(CompressSettings):
    """The compression of all adapters into one bundle, and what decides what errors are weighed by."""

    ratio: Amount = 16.0
    whiten: Flag = False
    calibration_examples: Count = 32

    @model_validator(mode="before")
    @classmethod
    def _given_target(cls, values: Any) -> Any:
        """No default ratio for a bundle that is given another target."""
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, Mapping) or "ratio" in given or not any(map(given.get, TARGETS)):
            return values
        return {**given, "ratio": 0.0}


@settings("gate")
class GateConfig:
    """What a bundle must reach before it may be published."""

    min_mean_gain_kept: Annotated[Real, Field(ge=-10.0, le=1.0)] = 0.9
    min_user_gain_kept: Annotated[Real, Field(ge=-10.0, le=1.0)] = 0.5
    max_relative_error: Amount = 0.7
    min_improved_users: Annotated[Real, Field(ge=0.0, le=1.0)] = 1.0
    min_mean_gain_over_shared: Annotated[Real, Field(ge=-10.0, le=10.0)] = -0.01
    max_loss_over_shared: Amount = 0.1
    rules: Texts = ()
    device: Device = "auto"

    _rules = field_validator("rules")(check_rules)


@settings("serve")
class TargetConfig:
    """One serving target that bundles are pushed to. `name` is its own in messages, "" is its kind."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{0,64}$"), allowed("letters, digits, . _ -")] = ""
    target: Literal["embedded", "vllm", "lorax"] = "embedded"
    form: Literal["", "bundle", "adapters"] = ""
    url: Annotated[str, Field(pattern="^https?://"), allowed("http://host:port")] = "http://127.0.0.1:8099"
    state: str = ".soppu/serve"
    vllm_python: str = ".venv-vllm/bin/python"
    vllm_options: Texts = ("--gpu-memory-utilization", "0.5")
    lorax_image: str = "ghcr.io/predibase/lorax:main"
    lorax_pull: Literal["missing", "always", "never"] = "missing"
    lorax_container: str = "soppu-lorax"
    lorax_volume: str = ".soppu/lorax"
    lorax_model: str = ""
    lorax_gpus: str = "all"
    lorax_shm_size: str = "1g"
    lorax_network: str = ""
    lorax_flags: Texts = ()
    lorax_environment: Annotated[Texts, allowed("a list of NAME=VALUE")] = ()
    lorax_dtype: Literal["float16", "bfloat16"] = "float16"
    drain_s: Natural = 60
    max_batch: Count = 16
    resident_mib: Natural = 1024
    canary_prompt: str = "def main():"
    canary_tokens: Count = 4
    canary_compared: Natural = 1000
    completion_tokens: Count = 24
    start_timeout_s: Count = 600

    @model_validator(mode="after")
    def _pushed_as(self) -> Self:
        if self.form == "adapters" and self.target != "lorax":
            raise ValueError(
                f"serve.form = 'adapters': serve.target = {self.target!r} takes bundles, lorax takes both"
            )
        if wrong := [text for text in self.lorax_environment if not text.partition("=")[0].isidentifier()]:
            raise ValueError(f"serve.lorax_environment = {wrong[0]!r}, allowed: NAME=VALUE")
        return self

    @property
    def pushes_adapters(self) -> bool:
        """Whether users' reconstructed adapters are pushed, not the bundle."""
        return (self.form or ("adapters" if self.target == "lorax" else "bundle")) == "adapters"

    @property
    def label(self) -> str:
        """What messages and reports call it."""
        return self.name or self.target


@settings("serve")
class ServeConfig(TargetConfig):
    """The serving target, and others: each of `targets` is a table of the keys it has otherwise."""

    targets: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """Targets are told apart by name, and live at an address of their own."""
        each = self.each()
        for key, place in (("name", "label"), ("url", "url")):
            values = [str(getattr(one, place)).rstrip("/") for one in each]
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(
                    f"serve.targets: {key} {twice[0]!r} twice; every target needs one of its own"
                )
        return self

    def each(self) -> tuple[TargetConfig, ...]:
        """Every target: those of `targets`, or this one. ConfigError names what is wrong in which."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(TargetConfig)}
        if not self.targets:
            return (TargetConfig(**own),)
        return tuple(
            build(TargetConfig, {**own, "name": "", **given}, source=f"serve.targets[{place}]")
            for place, given in enumerate(self.targets)
        )


@settings("registry")
class RegistryConfig:
    """Where adapters, bundles and the catalogue of them are kept."""

    root: str = ".soppu/registry"
    catalogue: str = ""


@settings("")
class Config:
    """One run. `seed` fixes every random choice; `runs` is the folder reports are written to."""

    seed: Seed = 0
    runs: str = "runs"
    frozen_dtype: Literal["auto", "float32", "bfloat16", "nf4"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    plan: PlanConfig = PlanConfig()
    lora: LoraSettings = LoraSettings()
    align: AlignConfig = AlignConfig()
    federation: FederationConfig = FederationConfig()
    compress: CompressConfig = CompressConfig()
    basis: BasisConfig = BasisConfig()
    gate: GateConfig = GateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    registry: RegistryConfig = RegistryConfig()

    @field_validator("data")
    @classmethod
    def _enough_examples(cls, value: DataConfig) -> DataConfig:
        if value.min_examples > value.train_examples:
            raise ValueError(
                f"data.min_examples = {value.min_examples}, allowed: at most data.train_examples"
                f" = {value.train_examples}"
            )
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        self.federation.own_rank(self.lora.rank)
        self.evaluate.check(METHODS, self.gate.rules)
        return self

    def training_digest(self) -> str:
        """Hash (16 hex) of what decides which adapters come out; not of where it runs or what comes after."""
        values = dataclasses.asdict(self)
        federation = {k: v for k, v in of_the_form(values["federation"]).items() if k not in OPERATIONAL}
        align = {k: v for k, v in values["align"].items() if k != "device"}
        parts = {k: values[k] for k in ("seed", "frozen_dtype", "compute_dtype", "data", "plan", "lora")}
        return _digest({**parts, "align": align, "model": self.base.model, "federation": federation})

    def digest(self, *sections: str) -> str:
        """Hash (16 hex) of the named sections, or of everything; the same settings give the same digest."""
        values = dataclasses.asdict(self)
        values["federation"] = of_the_form(values["federation"])
        return _digest({name: values[name] for name in sections} if sections else values)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file into a Config; `overrides`, keyed `"section.key"`, win over the file's values.

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
    return build(Config, values, source=source)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; `from_dict(to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: Config) -> str:
    """TOML text that `load` reads back to an equal Config."""
    return toml(to_dict(config))
