"""How a report's figures read in words: units, percentages, the certificate, the curl line.

The page and the terminal summary share these. Nothing here escapes HTML or Markdown.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

NONE = "–"
COMPLETION_TOKENS = 24
_DEFAULT_PROMPT = "def main():"


def printable(text: str) -> str:
    """The text on one line, control and invisible formatting characters shown as U+FFFD.

    User ids come from outside; in a terminal or an SVG such a character is more than a glyph.
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def percent(share: float | None, *, digits: int = 1) -> str:
    """0.1234 -> "12.3 %"."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def loss(value: float | None) -> str:
    """Nats a token, three decimals."""
    return NONE if value is None else f"{value:.3f}"


def short(value: float | None) -> str:
    """Three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def gain_kept(user: Mapping[str, Any]) -> str:
    """What a user keeps; in words where there was nothing to keep."""
    base, personal = user["loss_base"], user["loss_personal"]
    if None in (base, personal, user["gain_kept"]):
        return NONE
    return percent(user["gain_kept"]) if personal < base else "no gain"


def size(count: float) -> str:
    """Bytes in decimal units: 1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable: GB always returns")


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def ratio(before: float, after: float) -> str:
    """How many times smaller."""
    return f"{before / after:.2f}×" if after else NONE


def certificate(compression: Mapping[str, Any]) -> str:
    """The certificate as sentences: what was reached, what nobody can beat, what the start guaranteed."""
    part = compression["certificate"]
    least, reached = part["relative_lower_bound"], part["relative_achieved"]
    if least is None or reached is None:
        return "The bounds of this compression are not finite; nothing is certified."
    sentences = [
        f"Over all modules and users the fit has a relative error of {percent(reached, digits=2)} (root"
        " mean square, all adapters of a module weighing the same). No shared basis of rank"
        f" {compression['k']} can have less than {percent(least, digits=2)}, whatever the method: at most"
        f" {100 * max(reached - least, 0.0):.2f} percentage points are left to gain."
    ]
    if part["total"] and part["upper_bound"] is not None:
        guaranteed = math.sqrt(part["upper_bound"] / part["total"])
        sentences.append(
            f"The closed-form start alone guarantees {percent(min(guaranteed, 1.0), digits=2)} or better."
        )
    return " ".join(sentences)


def curl(report: Mapping[str, Any], url: str = "") -> str:
    """A shell line that asks the server for one user's text, quoted for a POSIX shell; "" without a URL.

    Args:
        url: of the server; "" takes the one the report says the bundle is served at.
    """
    serving = report["serving"] or {}
    url = url or serving.get("url", "")
    users = [*serving.get("completions", {}), *(user["id"] for user in report["users"])]
    if not url or not users:
        return ""
    body = {
        "inputs": serving.get("prompt") or _DEFAULT_PROMPT,
        "parameters": {"adapter_id": users[0], "max_new_tokens": COMPLETION_TOKENS},
    }
    words = (shlex.quote(f"{url.rstrip('/')}/generate"), shlex.quote(json.dumps(body)))
    return f"curl -s {words[0]} -H 'Content-Type: application/json' -d {words[1]}"
