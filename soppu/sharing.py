"""What users train and how they share it: the keys of [federation] that say so, and which go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from soppu.settings import Amount, Count, Natural, Real, Whole, allowed, settings

Mode = Literal["shared", "finetune", "fedsa", "dual", "local", "ffa"]
_BOTH_FACTORS = ("shared", "finetune", "dual")  # modes in which A and B of one product are averaged
# Keys of [federation] that change how a run is carried out, not what comes out of it.
OPERATIONAL = frozenset(
    {
        "client_cpus",
        "client_device",
        "client_gpus",
        "client_state",
        "hello_timeout_s",
        "members",
        "min_users",
        "round_timeout_s",
        "timeout_s",
        "together",
    }
)
# Keys that say something of cores alone: where users train LoRAs they are no part of what a run is.
OF_CORES = frozenset(
    {
        "form",
        "cohort",
        "basis_of",
        "basis_rank",
        "basis_modules",
        "basis_rounds",
        "basis_episode",
        "basis_steps",
        "basis_learning_rate",
        "basis_core_learning_rate",
        "core_own_rank",
        "together",
    }
)
MOST_OWN = 4  # `soppu.cores.core.MOST_OWN`


def of_the_form(federation: Mapping[str, Any]) -> dict[str, Any]:
    """The values of [federation] without those that say something of a form that users do not train."""
    return {k: v for k, v in federation.items() if federation["form"] != "lora" or k not in OF_CORES}


Clip = Annotated[Amount | Literal["median"], allowed("0, a number above 0, or median")]
Delta = Annotated[Real, Field(gt=0.0, lt=1.0)]


@settings("federation")
class SharingSettings:
    """What of an adapter is shared, how it is averaged, and what is hidden of it."""

    form: Literal["lora", "core", "auto"] = "lora"
    cohort: Annotated[Whole, Field(ge=2)] = 16
    basis_of: Literal["adapters", "shared", "learnt"] = "adapters"
    basis_rank: Count = 16
    basis_modules: tuple[str, ...] = ()
    basis_rounds: Count = 16
    basis_episode: Count = 8
    basis_steps: Count = 5
    basis_learning_rate: Annotated[Real, Field(gt=0.0)] = 5e-3
    basis_core_learning_rate: Annotated[Real, Field(gt=0.0)] = 0.06
    core_own_rank: Annotated[Whole, Field(ge=0, le=MOST_OWN)] = 0
    together: Count = 32
    mode: Mode = "finetune"
    private_rank: Natural = 0
    average: Literal["factors", "products"] = "factors"
    robust: Literal["mean", "trimmed", "median", "krum"] = "mean"
    robust_share: Annotated[Real, Field(ge=0.0, lt=0.5)] = 0.2
    clip: Clip = 0.0
    dp_at: Literal["server", "client"] = "server"
    dp_clip: Amount = 0.0
    dp_noise: Amount = 0.0
    dp_delta: Delta = 1e-5
    client_state: str = ".soppu/clients"

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.private_rank and self.mode != "dual":
            raise ValueError(self._refused("private_rank", "0", "only the mode dual has a private rank"))
        if self.average == "products":
            if self.mode not in _BOTH_FACTORS:
                words = (
                    f"the mode {self.mode} averages no products; allowed modes: {', '.join(_BOTH_FACTORS)}"
                )
                raise ValueError(self._refused("average", "factors", words))
            if self.robust != "mean":
                words = f"there is no {self.robust} of products without a matrix of the layer's size"
                raise ValueError(self._refused("robust", "mean", words))
        if self.dp_noise and not self.dp_clip:
            words = "noise is measured in clipping norms; federation.dp_clip is 0"
            raise ValueError(self._refused("dp_noise", "0, or dp_clip above 0", words))
        if self.form != "lora":
            self._check_cores()
        self._check_averages("local" if self.mode == "local" else "")
        if self.noisy_average:
            self._check_sensitivity()
        return self

    @property
    def noisy_average(self) -> bool:
        """Whether the server clips and noises the average: central differential privacy."""
        return bool(self.dp_clip) and self.dp_at == "server"

    @property
    def noisy_users(self) -> bool:
        """Whether each client clips and noises what it sends: local differential privacy."""
        return bool(self.dp_clip) and self.dp_at == "client"

    @property
    def around_shared(self) -> bool:
        """Whether a basis is made of the adapter that a cohort shares and of other directions beside it."""
        return self.basis_of != "adapters"

    def own_rank(self, rank: int) -> int:
        """How much of an adapter's rank is each user's own in the mode dual; ValueError for all or none."""
        own = self.private_rank or rank // 2
        if self.mode == "dual" and not 0 < own < rank:
            raise ValueError(
                f"federation.private_rank = {self.private_rank}: lora.rank = {rank} is the rank of the shared"
                f" and the private part together; allowed: 0 (half) or 1 to {rank - 1}, lora.rank above 1"
            )
        return own if self.mode == "dual" else 0

    def _check_cores(self) -> None:
        """A core is a user's own, and the server averages none."""
        if self.mode == "shared":
            words = f"in the form {self.form} every user trains a core of their own"
            raise ValueError(self._refused("mode", "any but shared", words))
        if self.noisy_average:
            words = f"in the form {self.form} each user's own core reaches the server, which averages none"
            raise ValueError(self._refused("dp_at", "'client'", words))
        if self.around_shared and self.mode != "finetune":
            words = "a basis around the shared adapter is of one whose factors are all averaged"
            raise ValueError(self._refused("mode", "'finetune'", words))
        if self.basis_modules and not self.around_shared:
            words = "a basis of adapters has all their modules; basis_of is 'adapters'"
            raise ValueError(self._refused("basis_modules", "[], or basis_of = 'shared' or 'learnt'", words))

    def _check_averages(self, mode: str) -> None:
        """In the mode local nothing is averaged."""
        for key, default in (("robust", "mean"), ("clip", 0.0)) if mode else ():
            if getattr(self, key) != default:
                raise ValueError(self._refused(key, repr(default), "the mode local averages nothing"))
        if mode and self.noisy_average:
            words = "the mode local averages nothing that a server could clip"
            raise ValueError(self._refused("dp_at", "'client'", words))

    def _check_sensitivity(self) -> None:
        """How far one user can move a plain mean of clipped factors is known; of the others it is not."""
        plain: dict[str, Any] = {"average": "factors", "robust": "mean", "clip": 0.0}
        for key, value in plain.items():
            if getattr(self, key) != value:
                words = "noise at the server is for the plain mean of changes that dp_clip has clipped"
                raise ValueError(self._refused(key, repr(value), words))

    def _refused(self, key: str, values: str, why: str) -> str:
        return f"federation.{key} = {getattr(self, key)!r}: {why}; allowed here: {values}"
