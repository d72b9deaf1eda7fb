"""What docs/operate.md says was measured, from its result file to between the page's marks.

python -m benchmarks.gateway_page
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import circumstances_line, fill, read_result
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "operate.md"
MARKS = ("gateway",)


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    found = read_result("gateway")
    parts = found.get("parts", {})
    told = [_WORDS[name](parts[name]) for name in _WORDS if name in parts]
    if not told:
        return {}
    newest = max((part["measured"] for part in parts.values()), key=lambda one: one["created"])
    return {"gateway": "\n".join(f"- {line}" for line in told) + "\n\n" + circumstances_line(newest)}


def _keys(part: Mapping[str, Any]) -> str:
    good, wrong = part["good"], part["wrong"]
    return (
        f"A key among {part['users']:,} is found in {good['p50_ms']:.2f} ms (median; p99"
        f" {good['p99_ms']:.2f} ms), a wrong one refused in {wrong['p50_ms']:.2f} ms."
    )


def _overhead(part: Mapping[str, Any]) -> str:
    direct, through = part["direct"], part["gateway"]
    return (
        f"One token straight from the server takes {direct['p50_ms']:.1f} ms (median), through the gateway"
        f" {through['p50_ms']:.1f} ms: {part['overhead_ms_p50']:.1f} ms more; {part['requests']:,} requests"
        f" in turns, one at a time. p99: {direct['p99_ms']:.1f} and {through['p99_ms']:.1f} ms."
    )


def _attempts(part: Mapping[str, Any]) -> str:
    return (
        f"Of {part['attempts']} attempts to reach another's model {part['attempts_refused']} were refused as"
        f" they should be, and {part['reached_a_server']} requests reached a server."
    )


def _fuzz(part: Mapping[str, Any]) -> str:
    return (
        f"{part['requests']:,} requests that `schemathesis` made up of the gateway's own document:"
        f" {part['server_errors']} answers of 500 or more."
    )


def _kills(part: Mapping[str, Any]) -> str:
    killed, other = sum(part["kills"].values()), part["wrong_user"] + part["unknown_text"]
    whom = ", ".join(f"{name} {count}" for name, count in part["kills"].items())
    return (
        f"{killed} times SIGKILL at random moments of a publication to {part['users']} users under load"
        f" ({whom}): {part['answered']:,} requests were answered, {part['own']:,} by one version of the"
        f" caller's own adapter, {other} by anything else, {part['wrong_version']} by"
        " another version than the answer names. Texts tell: of"
        f" {part['distinct_texts']} that users' two versions say no two are alike. The others were told:"
        f" {_ended(part)}."
    )


def _overload(part: Mapping[str, Any]) -> str:
    memory = part["memory_mib"]
    wrong = part["wrong_user"] + part["unknown_text"] + part["wrong_version"]
    return (
        f"{part['clients']} clients for {part['seconds'] / 60:.0f} minutes, more than it was set to take:"
        f" {part['ended'].get('200', 0):,} answers, {part['ended'].get('429', 0):,} times 429,"
        f" {wrong} of another user or version; the gateway's memory was at most"
        f" {memory['first_quarter_max']:.0f} MiB in the first quarter and"
        f" {memory['last_quarter_max']:.0f} MiB in the last; {part['recovery_s']:.1f} s after the end ten"
        " requests in a row had been answered, each within a second."
    )


def _ended(part: Mapping[str, Any]) -> str:
    others = {how: count for how, count in part["ended"].items() if how != "200"}
    return ", ".join(f"{how} {count:,}" for how, count in sorted(others.items())) or "none"


_WORDS = {
    "overhead": _overhead,
    "keys": _keys,
    "attempts": _attempts,
    "fuzz": _fuzz,
    "kills": _kills,
    "overload": _overload,
}


def write_page() -> None:
    """Fill the page."""
    fill(blocks(), PAGE)


if __name__ == "__main__":
    write_page()
