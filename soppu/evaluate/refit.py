"""Whether the basis that users' cores are told in still fits: by probes, a few who train freely beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import fsum
from typing import Any

from soppu.basis_settings import BasisConfig
from soppu.evaluate.losses import TOLERANCE


@dataclass(frozen=True)
class Probe:
    """A user's adapter that was trained freely since the basis is there, beside the user's core.

    Gains are over the shared adapter where there is one, else over the base model, in nats a token of
    held-out text; None where that text is not at hand, or the user has no core.
    """

    user: str
    adapter_id: str
    error: float  # relative error of the adapter in the basis
    gain: float | None = None  # the adapter's
    core_gain: float | None = None  # the core's


@dataclass(frozen=True)
class Refit:
    """The figures, and what follows from them."""

    basis_id: str
    due: bool
    reasons: tuple[str, ...]  # the limits that are broken, with value and limit
    error_mean: float | None  # of all probes; None without any
    error_worst: float | None
    measured: int  # probes that gain more than noise, and have a core beside them
    gain_kept: float | None  # of all their gain, what their cores have
    short_users: tuple[str, ...]  # whose core keeps less than `basis.min_gain_kept` of their probe's gain
    short_share: float | None  # of those measured
    probes: tuple[Probe, ...]
    grown_from: str = ""  # the basis that this run found due, and made this one of

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def decide(basis_id: str, probes: Sequence[Probe], settings: BasisConfig) -> Refit:
    """Whether a basis is due for a refit. Pure. Without a probe nothing is known, and it is not.

    A probe that gains no more than what is noise (`TOLERANCE`) says nothing of what a core keeps.
    """
    errors = [probe.error for probe in probes]
    gains = {
        probe.user: (probe.gain, probe.core_gain)
        for probe in probes
        if probe.gain is not None and probe.core_gain is not None and probe.gain > TOLERANCE
    }
    least = settings.min_gain_kept
    short = tuple(sorted(user for user, (gain, core) in gains.items() if core < least * gain))
    gained, kept = (fsum(column) for column in zip(*gains.values(), strict=True)) if gains else (0.0, 0.0)
    found = Refit(
        basis_id=basis_id,
        due=False,
        reasons=(),
        error_mean=fsum(errors) / len(errors) if errors else None,
        error_worst=max(errors, default=None),
        measured=len(gains),
        gain_kept=kept / gained if gains else None,
        short_users=short,
        short_share=len(short) / len(gains) if gains else None,
        probes=tuple(probes),
    )
    reasons = tuple(_reasons(found, settings))
    return replace(found, due=bool(reasons), reasons=reasons)


def _reasons(found: Refit, settings: BasisConfig) -> Iterator[str]:
    if found.error_mean is not None and found.error_mean > settings.max_error:
        yield (
            f"basis.max_error: free adapters have a relative error of {found.error_mean:.3g} on average, at"
            f" most {settings.max_error:g}"
        )
    if found.short_share is not None and found.short_share > settings.max_short_users:
        users = f"{len(found.short_users)} of {found.measured} ({', '.join(found.short_users)})"
        yield (
            f"basis.max_short_users: {users} keep less than {settings.min_gain_kept:g} of what a free adapter"
            f" gains, at most a share of {settings.max_short_users:g}"
        )
