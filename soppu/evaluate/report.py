"""report.json: everything a run found out, put into one dict, checked, and written beside its HTML page.

Nothing is measured here. `soppu.evaluate.schema` knows the shape, `docs/report.md` what each field means.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soppu import __version__, files
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.options import ratio
from soppu.config import Config
from soppu.errors import ReportError
from soppu.evaluate import gains, html, schema
from soppu.evaluate.gate import Verdict
from soppu.evaluate.intervals import Interval
from soppu.evaluate.losses import CURRENT, UserLosses
from soppu.evaluate.tradeoff import page
from soppu.evaluate.tradeoff import schema as tradeoff
from soppu.federation.personalise import PERSONAL

JSON_FILE = "report.json"
HTML_FILE = "report.html"
_TOLD = frozenset({"plan", "align", "rounds", "refused"})


def utc_now() -> str:
    """Now, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_hardware() -> str:
    """This machine in words: system, processor architecture, Python, usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{platform.system()} {platform.release()}, {platform.machine()}, {cores} cores,"
        f" Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of."""

    run: str  # its id
    config: Config  # what it ran with; only its digest, seed and model name are kept
    losses: Sequence[UserLosses]  # of the users measured
    adapter_ids: Mapping[str, str]  # everybody in the bundle, in the order the report lists them
    compression: CompressionReport  # the bundle's own
    bytes_before: int  # the adapters' files, added up
    bytes_after: int  # the bundle's file
    verdict: Verdict
    set_id: str = ""  # identities are "" where unknown
    bundle_id: str = ""
    base_hash: str = ""
    measured: str = ""  # on what the losses were measured, and where
    basis: Mapping[str, Any] | None = None  # `refit.Refit`; None where no set of cores is
    federation: Mapping[str, Any] | None = None  # result.json of the federated run; None for a recompression
    serving: Mapping[str, Any] | None = None  # what the first live target serves; None before publication
    targets: Sequence[Mapping[str, Any]] = ()  # what became of every publication
    stages: Sequence[Mapping[str, Any]] = ()  # name, seconds and attempts, in the order they ran
    created: str = field(default_factory=utc_now)  # UTC, ISO 8601
    hardware: str = field(default_factory=describe_hardware)


def build(inputs: ReportInputs) -> dict[str, Any]:
    """The report as JSON values. Pure: the same inputs give the same report. Numbers not finite become null.

    Raises:
        ReportError: `federation` lacks something; the message names each missing field.
    """
    told = inputs.federation
    if told is not None and (lacking := sorted(_TOLD - told.keys())):
        raise ReportError(f"result of the federated run: missing: {', '.join(lacking)}")
    canaries = (inputs.serving or {}).get("canaries", {})
    ok = bool(canaries) and not any(canaries.values())
    report = {
        "format": 1,
        "run": inputs.run,
        "created": inputs.created,
        "soppu": __version__,
        "config_digest": inputs.config.digest(),
        "seed": inputs.config.seed,
        "hardware": inputs.hardware,
        "measured": inputs.measured,
        "base_model": inputs.config.base.model,
        "base_hash": inputs.base_hash,
        "plan": told and {name: told["plan"][name] for name in told["plan"] if name != "json"},
        "align": told and told["align"],
        "users": _users(inputs),
        "gains": gains.told(inputs.losses, seed=inputs.config.seed),
        "federation": told and _federation(told, inputs.config),
        "compression": _compression(inputs),
        "gate": inputs.verdict.to_dict(),
        "basis": inputs.basis,
        "serving": inputs.serving and {**inputs.serving, "canaries_ok": ok},
        "targets": inputs.targets,
        "stages": inputs.stages,
    }
    return schema.check(_plain(report), source="report")


def write(folder: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write report.json and report.html, each atomically; gives both paths.

    Raises:
        ReportError: the report is not whole; nothing is written.
        StorageError: the disk refused.
    """
    schema.check(report, source="report")
    path = folder / JSON_FILE
    files.write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return path, render(folder, report)


def render(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write report.html from what `build` or `read` gave, with the arms compared so far, and their page.

    Raises:
        ReportError: the folder's newest comparison of arms is not whole.
        StorageError: the disk refused.
    """
    path, compared = folder / HTML_FILE, folder / tradeoff.FILE
    arms = tradeoff.read(compared) if compared.exists() else None
    if arms:
        page.write_page(folder)
    files.write_text(path, html.page(report, arms=arms))
    return path


def read(path: Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        ReportError: no such file, not JSON, or fields missing or of another type; each is named.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            f"{path}: no such file; give the folder of a run that has reached its report"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON: {error}; run the pipeline's report stage again") from None
    return schema.check(value, source=str(path))


def _users(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Everybody in the bundle, and who was measured, or has been given nothing by the federation, besides."""
    measured = {one.user: one for one in inputs.losses}
    chosen = (inputs.federation or {}).get("served", {})
    over = {
        name: gains.by_user(inputs.losses, "compressed", over=name, seed=inputs.config.seed)
        for name in ("base", "shared")
    }
    rows = []
    for user in dict.fromkeys([*inputs.adapter_ids, *measured, *chosen]):
        one = measured.get(user)
        rows.append(
            {
                "id": user,
                "examples": one.examples if one else 0,
                "measured_on": one.measured_on if one else "",
                "loss_base": one and one.base,
                "loss_shared": one and one.shared,
                "loss_personal": one and one.personal,
                "loss_compressed": one and one.compressed,
                "gain_kept": one and one.gain_kept,
                "gain_over_base": _interval(over["base"].get(user)),
                "gain_over_shared": _interval(over["shared"].get(user)),
                "served": one.served if one else chosen.get(user, CURRENT),
                "compression_lost": one and one.compression_lost,
                "relative_error": inputs.compression.relative_error.get(user),
                "adapter_id": inputs.adapter_ids.get(user, ""),
            }
        )
    return rows


def _interval(gain: Interval | None) -> dict[str, Any] | None:
    return asdict(gain) if gain else None


def _federation(told: Mapping[str, Any], config: Config) -> dict[str, Any]:
    rounds = told["rounds"]
    totals = {name: sum(log.get(name, 0) for log in rounds) for name in ("bytes_up", "bytes_down", "seconds")}
    how = {"mode": told.get("mode", ""), "privacy": told.get("privacy")}
    own = {
        **how,
        "refused": told["refused"],
        "forms": _forms(rounds),
        "rounds_log": list(map(_round, rounds)),
    }
    limits = {"max_shared_rounds": config.federation.rounds, "patience": config.federation.patience}
    return {"rounds": len(rounds), **limits, **totals, **own}


def _round(log: Mapping[str, Any]) -> dict[str, Any]:
    """One round, without the zeros that stand for what was not measured in it."""
    nobody = ("train_loss", "emulator_loss", "shared_loss") if not log.get("accepted") else ()
    unheard = ("public_loss",) if log.get("mode") == PERSONAL else ()
    return {**log, **dict.fromkeys((*nobody, *unheard))}


def _forms(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many users sent their own adapter in which form, and the bytes of those replies."""
    found: dict[str, dict[str, int]] = {}
    for log in rounds:
        for one in log.get("received", {}).values() if log.get("mode") == PERSONAL else ():
            form = found.setdefault(one.get("form", ""), {"users": 0, "bytes_up": 0})
            form["users"] += 1
            form["bytes_up"] += one.get("bytes_up", 0)
    return dict(sorted(found.items()))


def _compression(inputs: ReportInputs) -> dict[str, Any]:
    made, after = inputs.compression, max(inputs.bytes_after, 1)
    overall = made.overall
    bounds = {
        "relative_lower_bound": overall.relative_lower_bound,
        "relative_achieved": overall.relative_achieved,
        "modules": {name: asdict(part) for name, part in made.certificates.items()},
    }
    # what the report calls as the bundle does; the rest is named or measured otherwise
    named_alike = {
        name: value for name, value in vars(made).items() if name in schema.Compression.model_fields
    }
    return named_alike | {
        "bundle_id": inputs.bundle_id,
        "set_id": inputs.set_id,
        "k": made.rank,
        "dtype": made.storage,
        "bytes_before": inputs.bytes_before,
        "bytes_after": inputs.bytes_after,
        "ratio": inputs.bytes_before / after,
        "ratio_16_bit": ratio(made.parameters_before, after),
        "relative_error": {
            "rms": made.relative_error_rms,
            "mean": made.relative_error_mean,
            "max": made.relative_error_max,
        },
        "lower_bound": overall.relative_lower_bound,
        "by_module": made.module_error,
        "certificate": asdict(overall) | bounds,
    }


def _plain(value: Any) -> Any:
    """JSON values: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
