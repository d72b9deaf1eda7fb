"""The shape of report.json, and the check of a report against it. `docs/report.md` says what fields mean."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from soppu.errors import ReportError
from soppu.evaluate.gate import Text, Verdict
from soppu.settings import Flag, Natural, Real, faults

_SHOWN = 20  # faults spelt out; of more, the number is told


class _Part(BaseModel):
    """An object of the report. Every field is always there; fields beyond them are skipped."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Plan(_Part):
    kept: list[Natural]
    adapter_layers: list[Natural]
    hash: Text


class _Distance(_Part):
    l2: Real | None
    kl: Real | None


class _Align(_Part):
    before: _Distance
    after: _Distance


class _UserGain(_Part):
    mean: Real
    low: Real | None
    high: Real | None


class _Gain(_UserGain):
    better: Natural
    users: Natural
    worst: Real
    worst_user: Text


class _Gains(_Part):
    over_base: _Gain | None
    over_shared: _Gain | None
    personal_over_shared: _Gain | None


class _User(_Part):
    id: Text
    examples: Natural
    measured_on: Text
    loss_base: Real | None
    loss_shared: Real | None
    loss_personal: Real | None
    loss_compressed: Real | None
    gain_kept: Real | None
    gain_over_base: _UserGain | None
    gain_over_shared: _UserGain | None
    served: Text
    compression_lost: Flag | None
    relative_error: Real | None
    adapter_id: Text


class _Form(_Part):
    users: Natural
    bytes_up: Natural


class _Received(_Part):
    form: Text
    bytes_up: Natural
    loss_float32: Real | None
    loss_ternary: Real | None


class _Round(_Part):
    round: Natural
    mode: Text
    bytes_up: Natural
    bytes_down: Natural
    seconds: Real
    train_loss: Real | None
    emulator_loss: Real | None
    shared_loss: Real | None
    public_loss: Real | None
    accepted: list[Text]
    received: dict[Text, _Received]
    refused: dict[Text, Text]


class _Privacy(_Part):
    at: Text
    clip: Real
    noise: Real
    releases: Natural
    delta: Real
    epsilon: Real | None
    not_covered: Text


class _Federation(_Part):
    mode: Text
    privacy: _Privacy | None
    rounds: Natural
    max_shared_rounds: Natural
    patience: Natural
    bytes_up: Natural
    bytes_down: Natural
    seconds: Real
    refused: dict[Text, Text]
    forms: dict[Text, _Form]
    rounds_log: list[_Round]


class _Errors(_Part):
    rms: Real | None
    mean: Real | None
    max: Real | None


class _Bounds(_Part):
    lower_bound: Real | None
    achieved: Real | None
    upper_bound: Real | None
    total: Real | None
    confidence: Real


class _Certificate(_Bounds):
    relative_lower_bound: Real | None
    relative_achieved: Real | None
    modules: dict[Text, _Bounds]


class Compression(_Part):
    """The bundle: what was asked for, what came out, and what could have."""

    bundle_id: Text
    set_id: Text
    method: Text
    target: Text
    k: Natural
    k_used: dict[Text, Natural]
    clusters: Natural
    whitened: Flag
    steps: dict[Text, Natural]
    dtype: Text
    device: Text
    seconds: Real
    bytes_before: Natural
    bytes_after: Natural
    ratio: Real
    ratio_16_bit: Real
    parameters_before: Natural
    parameters_after: Natural
    relative_error: _Errors
    lower_bound: Real | None
    by_module: dict[Text, dict[Text, Real | None]]
    certificate: _Certificate


class _Probe(_Part):
    user: Text
    adapter_id: Text
    error: Real
    gain: Real | None
    core_gain: Real | None


class _Basis(_Part):
    basis_id: Text
    due: Flag
    reasons: list[Text]
    error_mean: Real | None
    error_worst: Real | None
    measured: Natural
    gain_kept: Real | None
    short_users: list[Text]
    short_share: Real | None
    probes: list[_Probe]
    grown_from: Text


class _Serving(_Part):
    target: Text
    url: Text
    bundle_id: Text
    canaries_ok: Flag
    canaries: dict[Text, Text]
    prompt: Text
    completions: dict[Text, Text]
    asked_as: dict[Text, Text]


class _Target(_Part):
    name: Text
    target: Text
    form: Text
    url: Text
    bundle_id: Text
    users: Natural
    push_s: Real
    canaries_s: Real
    error: Text


class _Stage(_Part):
    name: Text
    seconds: Real
    attempts: Natural


class Report(_Part):
    """All of it."""

    format: Literal[1]
    run: Text
    created: Text
    soppu: Text
    config_digest: Text
    seed: Natural
    hardware: Text
    measured: Text
    base_model: Text
    base_hash: Text
    plan: _Plan | None
    align: _Align | None
    users: list[_User]
    gains: _Gains
    federation: _Federation | None
    compression: Compression
    gate: Verdict
    basis: _Basis | None = None  # reports from before there were cores have none
    serving: _Serving | None
    targets: list[_Target]
    stages: list[_Stage]


def check(report: object, *, source: str) -> dict[str, Any]:
    """Give the report back if it has the shape of `Report`.

    Args:
        source: file named in the message.

    Raises:
        ReportError: fields missing or of another type, all of them (up to 20), or another format number.
    """
    if not isinstance(report, dict):
        raise ReportError(f"{source}: found {report!r:.60}, allowed: an object")
    try:
        Report.model_validate(report)
    except ValidationError as error:
        lines = list(faults(error, of=Report))
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ReportError("\n".join(f"{source}: {line}" for line in lines[:_SHOWN] + more)) from None
    return report
