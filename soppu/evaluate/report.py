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
from soppu.evaluate import html, schema
from soppu.evaluate.gate import Verdict
from soppu.evaluate.losses import UserLosses
from soppu.evaluate.schema import FORMAT

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
class Stage:
    """One stage of the pipeline: wall time of the attempt that succeeded, and how many it took."""

    name: str
    seconds: float
    attempts: int = 1


@dataclass(frozen=True)
class Serving:
    """Where a bundle went live.

    Attributes:
        target: name of the target, as in `serve.target`.
        url: the server.
        bundle_id: the bundle that is active there.
        canaries: user -> what was wrong with the canary's answer, "" if nothing.
        prompt: what the sample completions go on from.
        completions: user -> sample completion; may be empty.
    """

    target: str
    url: str
    bundle_id: str
    canaries: Mapping[str, str]
    prompt: str = "def main():"
    completions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of.

    Attributes:
        run: id of the run.
        config: the configuration it ran with; only its digest, seed and model name are kept.
        losses: held-out losses of the users measured.
        adapter_ids: user -> adapter id, everybody in the bundle, in the order the report lists them.
        compression: the bundle's own report.
        bytes_before: the adapters' files, added up.
        bytes_after: the bundle's file.
        verdict: the gate's.
        set_id, bundle_id, base_hash: identities, "" where unknown.
        federation: the parsed result.json of the federated run; None for a recompression.
        serving: None before publication.
        stages: in the order they ran.
        created: UTC, ISO 8601.
        hardware: the machine in words.
    """

    run: str
    config: Config
    losses: Sequence[UserLosses]
    adapter_ids: Mapping[str, str]
    compression: CompressionReport
    bytes_before: int
    bytes_after: int
    verdict: Verdict
    set_id: str = ""
    bundle_id: str = ""
    base_hash: str = ""
    federation: Mapping[str, Any] | None = None
    serving: Serving | None = None
    stages: Sequence[Stage] = ()
    created: str = field(default_factory=utc_now)
    hardware: str = field(default_factory=describe_hardware)


def build(inputs: ReportInputs) -> dict[str, Any]:
    """The report as JSON values. Pure: the same inputs give the same report. Numbers not finite become null.

    Raises:
        ReportError: `federation` lacks something; the message names each missing field.
    """
    told = inputs.federation
    if told is not None and (lacking := sorted(_TOLD - told.keys())):
        raise ReportError(f"result of the federated run: missing: {', '.join(lacking)}")
    report = {
        "format": FORMAT,
        "run": inputs.run,
        "created": inputs.created,
        "soppu": __version__,
        "config_digest": inputs.config.digest(),
        "seed": inputs.config.seed,
        "hardware": inputs.hardware,
        "base_model": inputs.config.base.model,
        "base_hash": inputs.base_hash,
        "plan": told and _without(told["plan"], "json"),
        "align": told and told["align"],
        "users": _users(inputs),
        "federation": told and _federation(told),
        "compression": _compression(inputs),
        "gate": inputs.verdict.to_dict(),
        "serving": inputs.serving and _serving(inputs.serving),
        "stages": [asdict(stage) for stage in inputs.stages],
    }
    return schema.check(_plain(report), source="report")


def with_publication(
    report: Mapping[str, Any], serving: Serving | None, *, stages: Sequence[Stage]
) -> dict[str, Any]:
    """A copy that says where the bundle is served and holds the stages up to then."""
    changed = {
        "serving": serving and _serving(serving),
        "stages": [asdict(stage) for stage in stages],
    }
    return schema.check(_plain({**report, **changed}), source="report")


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
    """Write report.html alone, from a report that `build` or `read` gave. Raises StorageError."""
    path = folder / HTML_FILE
    files.write_text(path, html.page(report))
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
    measured = {one.user: one for one in inputs.losses}
    rows = []
    for user in dict.fromkeys([*inputs.adapter_ids, *measured]):
        one = measured.get(user)
        rows.append(
            {
                "id": user,
                "examples": one.examples if one else 0,
                "loss_base": one and one.base,
                "loss_personal": one and one.personal,
                "loss_compressed": one and one.compressed,
                "gain_kept": one and one.gain_kept,
                "relative_error": inputs.compression.relative_error.get(user),
                "adapter_id": inputs.adapter_ids.get(user, ""),
            }
        )
    return rows


def _federation(told: Mapping[str, Any]) -> dict[str, Any]:
    rounds = told["rounds"]
    totals = {name: sum(log.get(name, 0) for log in rounds) for name in ("bytes_up", "bytes_down", "seconds")}
    own = {"refused": told["refused"], "forms": _forms(rounds), "rounds_log": rounds}
    return {"rounds": len(rounds), **totals, **own}


def _forms(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many users sent their own adapter in which form, and the bytes of those replies."""
    found: dict[str, dict[str, int]] = {}
    for log in rounds:
        for one in log.get("received", {}).values() if log.get("mode") == "personal" else ():
            form = found.setdefault(one.get("form", ""), {"users": 0, "bytes_up": 0})
            form["users"] += 1
            form["bytes_up"] += one.get("bytes_up", 0)
    return dict(sorted(found.items()))


def _compression(inputs: ReportInputs) -> dict[str, Any]:
    made = inputs.compression
    overall = made.overall
    bounds = {
        "relative_lower_bound": overall.relative_lower_bound,
        "relative_achieved": overall.relative_achieved,
        "modules": {name: asdict(part) for name, part in made.certificates.items()},
    }
    return {
        "bundle_id": inputs.bundle_id,
        "set_id": inputs.set_id,
        "method": made.method,
        "target": made.target,
        "k": made.rank,
        "k_used": made.k_used,
        "clusters": made.clusters,
        "whitened": made.whitened,
        "steps": made.steps,
        "dtype": made.storage,
        "device": made.device,
        "seconds": made.seconds,
        "bytes_before": inputs.bytes_before,
        "bytes_after": inputs.bytes_after,
        "ratio": inputs.bytes_before / max(inputs.bytes_after, 1),
        "ratio_16_bit": ratio(made.parameters_before, max(inputs.bytes_after, 1)),
        "parameters_before": made.parameters_before,
        "parameters_after": made.parameters_after,
        "relative_error": {
            "rms": made.relative_error_rms,
            "mean": made.relative_error_mean,
            "max": made.relative_error_max,
        },
        "lower_bound": overall.relative_lower_bound,
        "by_module": made.module_error,
        "certificate": asdict(overall) | bounds,
    }


def _serving(serving: Serving) -> dict[str, Any]:
    ok = bool(serving.canaries) and not any(serving.canaries.values())
    return {**asdict(serving), "canaries_ok": ok}


def _without(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != name}


def _plain(value: Any) -> Any:
    """JSON values: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
