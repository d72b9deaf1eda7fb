"""The shape of report.json, as a table of paths, and the check of a report against it.

`docs/report.md` says what every field means. Fields beyond the table are allowed: older readers skip them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from soppu.errors import ReportError

FORMAT = 1

# `[]` is every entry of a list, `{}` every value of an object with free keys. "?": may be null.
FIELDS: Mapping[str, str] = {
    "format": "count",
    "run": "text",
    "created": "text",
    "soppu": "text",
    "config_digest": "text",
    "seed": "count",
    "hardware": "text",
    "base_model": "text",
    "base_hash": "text",
    "plan": "object?",
    "plan.kept": "list",
    "plan.kept[]": "count",
    "plan.adapter_layers": "list",
    "plan.adapter_layers[]": "count",
    "plan.hash": "text",
    "align": "object?",
    "align.before": "object",
    "align.before.l2": "number?",
    "align.before.kl": "number?",
    "align.after": "object",
    "align.after.l2": "number?",
    "align.after.kl": "number?",
    "users": "list",
    "users[]": "object",
    "users[].id": "text",
    "users[].examples": "count",
    "users[].loss_base": "number?",
    "users[].loss_personal": "number?",
    "users[].loss_compressed": "number?",
    "users[].gain_kept": "number?",
    "users[].relative_error": "number?",
    "users[].adapter_id": "text",
    "federation": "object?",
    "federation.rounds": "count",
    "federation.bytes_up": "count",
    "federation.bytes_down": "count",
    "federation.seconds": "number",
    "federation.refused": "object",
    "federation.refused{}": "text",
    "federation.forms": "object",
    "federation.forms{}": "object",
    "federation.forms{}.users": "count",
    "federation.forms{}.bytes_up": "count",
    "federation.rounds_log": "list",
    "federation.rounds_log[]": "object",
    "federation.rounds_log[].round": "count",
    "federation.rounds_log[].mode": "text",
    "federation.rounds_log[].bytes_up": "count",
    "federation.rounds_log[].bytes_down": "count",
    "federation.rounds_log[].seconds": "number",
    "federation.rounds_log[].train_loss": "number?",
    "federation.rounds_log[].emulator_loss": "number?",
    "federation.rounds_log[].accepted": "list",
    "federation.rounds_log[].accepted[]": "text",
    "federation.rounds_log[].received": "object",
    "federation.rounds_log[].received{}": "object",
    "federation.rounds_log[].received{}.form": "text",
    "federation.rounds_log[].received{}.bytes_up": "count",
    "federation.rounds_log[].received{}.loss_float32": "number?",
    "federation.rounds_log[].received{}.loss_ternary": "number?",
    "federation.rounds_log[].refused": "object",
    "federation.rounds_log[].refused{}": "text",
    "compression": "object",
    "compression.bundle_id": "text",
    "compression.set_id": "text",
    "compression.method": "text",
    "compression.target": "text",
    "compression.k": "count",
    "compression.k_used": "object",
    "compression.k_used{}": "count",
    "compression.clusters": "count",
    "compression.whitened": "flag",
    "compression.steps": "object",
    "compression.steps{}": "count",
    "compression.dtype": "text",
    "compression.device": "text",
    "compression.seconds": "number",
    "compression.bytes_before": "count",
    "compression.bytes_after": "count",
    "compression.ratio": "number",
    "compression.ratio_16_bit": "number",
    "compression.parameters_before": "count",
    "compression.parameters_after": "count",
    "compression.relative_error": "object",
    "compression.relative_error.rms": "number?",
    "compression.relative_error.mean": "number?",
    "compression.relative_error.max": "number?",
    "compression.lower_bound": "number?",
    "compression.by_module": "object",
    "compression.by_module{}": "object",
    "compression.by_module{}{}": "number?",
    "compression.certificate": "object",
    "compression.certificate.lower_bound": "number?",
    "compression.certificate.achieved": "number?",
    "compression.certificate.upper_bound": "number?",
    "compression.certificate.total": "number?",
    "compression.certificate.confidence": "number",
    "compression.certificate.relative_lower_bound": "number?",
    "compression.certificate.relative_achieved": "number?",
    "compression.certificate.modules": "object",
    "compression.certificate.modules{}": "object",
    "compression.certificate.modules{}.lower_bound": "number?",
    "compression.certificate.modules{}.achieved": "number?",
    "compression.certificate.modules{}.upper_bound": "number?",
    "compression.certificate.modules{}.total": "number?",
    "compression.certificate.modules{}.confidence": "number",
    "gate": "object",
    "gate.passed": "flag",
    "gate.reasons": "list",
    "gate.reasons[]": "text",
    "gate.mean_gain_kept": "number",
    "gate.worst_user": "text",
    "gate.worst_gain_kept": "number",
    "gate.improved_share": "number",
    "gate.max_relative_error": "number",
    "gate.worst_error_user": "text",
    "gate.unmeasured": "list",
    "gate.unmeasured[]": "text",
    "gate.limits": "object",
    "gate.limits{}": "number",
    "serving": "object?",
    "serving.target": "text",
    "serving.url": "text",
    "serving.bundle_id": "text",
    "serving.canaries_ok": "flag",
    "serving.canaries": "object",
    "serving.canaries{}": "text",
    "serving.prompt": "text",
    "serving.completions": "object",
    "serving.completions{}": "text",
    "stages": "list",
    "stages[]": "object",
    "stages[].name": "text",
    "stages[].seconds": "number",
    "stages[].attempts": "count",
}

_STEP = re.compile(r"\[\]|\{\}|[^.\[\]{}]+")
_SHOWN = 20
_MISSING = object()


def check(report: object, *, source: str) -> dict[str, Any]:
    """Give the report back if it has the shape of `FIELDS`.

    Args:
        source: file named in the message.

    Raises:
        ReportError: fields missing or of another type, all of them (up to 20), or another format number.
    """
    if not isinstance(report, dict):
        raise ReportError(f"{source}: expected an object, found {_brief(report)}")
    found = list(faults(report))
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ReportError("\n".join(f"{source}: {fault}" for fault in found[:_SHOWN] + more))
    if report["format"] != FORMAT:
        raise ReportError(f"{source}: format: found {report['format']}, this version reads {FORMAT}")
    return report


def faults(report: Mapping[str, Any]) -> Iterator[str]:
    """Every field that is missing or of the wrong type, in the order of `FIELDS`."""
    for path, kind in FIELDS.items():
        for label, value in _found(report, _STEP.findall(path), ""):
            if value is _MISSING:
                yield f"{label}: missing"
            elif not _fits(value, kind):
                yield f"{label}: expected {_WORDS[kind.rstrip('?')]}, found {_brief(value)}"


def _found(value: Any, steps: list[str], label: str) -> Iterator[tuple[str, Any]]:
    """All values a path points at. A parent of the wrong type has none: its own line reports it."""
    if not steps:
        yield label, value
        return
    step, rest = steps[0], steps[1:]
    if step == "[]":
        for index, item in enumerate(value if isinstance(value, list) else ()):
            yield from _found(item, rest, f"{label}[{index}]")
    elif not isinstance(value, dict):
        return
    elif step == "{}":
        for key, item in value.items():
            yield from _found(item, rest, f"{label}[{key!r}]")
    elif step in value:
        yield from _found(value[step], rest, f"{label}.{step}" if label else step)
    elif not rest:
        yield f"{label}.{step}" if label else step, _MISSING


def _fits(value: object, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    return _KINDS[kind](value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: Mapping[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "flag": lambda value: isinstance(value, bool),
    "count": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "number": _is_number,
    "list": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_WORDS: Mapping[str, str] = {
    "text": "a text",
    "flag": "true or false",
    "count": "a whole number, at least 0",
    "number": "a finite number",
    "list": "a list",
    "object": "an object",
}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
