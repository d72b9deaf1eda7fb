"""Tables and finding of the router, from its result file to between the marks of docs/router.md.

python -m benchmarks.router_page
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT
from soppu.serve.router.measured import BASE, CHEAPER, PERSONAL
from soppu.serve.router.policies import ORACLE

PAGE = ROOT / "docs" / "router.md"
MARKS = ("router-finding", "router-policies", "router-arms")
_NAMES = {
    PERSONAL: "`personal`: always the user's own",
    BASE: "`base`: always the base model",
    CHEAPER: "`cheaper`: always the cheaper form",
    "gain": "`gain`: measured on other prompts of the user",
    "neighbours": "`neighbours`: the k nearest prompts",
    "length": "`length`: tokens in the prompt",
    "likelihood": "`likelihood` of the prompt",
    ORACLE: "oracle",
}
_AGAINST_PERSONAL = ("interval_personal", "interval_personal_over_prompts")
Row = Mapping[str, Any]


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; nothing without a result file."""
    if not (found := read_result("router")):
        return {}
    return {
        "router-finding": finding(found),
        "router-policies": f"{_policies(found)}\n\n{_judged(found)} {circumstances_line(found)}",
        "router-arms": f"{_arms(found)}\n\n{_timed(found)}",
    }


def finding(found: Mapping[str, Any]) -> str:
    """What the figures say of routing at all, in sentences that turn with them."""
    rows = {row["policy"]: row for row in found["rows"]}
    arms = {arm["arm"]: arm for arm in found["arms"]}
    base, most = rows[BASE], _turned(rows[ORACLE]["interval_personal"])
    told = [
        f"Always personal is {base['regret_personal']:.4f} nats a token better than always base"
        f" {_ends(base['interval_personal'])}, and {_longer(arms[PERSONAL])}. Even the oracle is only"
        f" {-rows[ORACLE]['regret_personal']:.4f} better still {_ends(most)}.",
        _of_policies(rows),
    ]
    if CHEAPER in rows:
        told.append(_of_bytes(rows, arms))
    return " ".join(told)


def _longer(arm: Mapping[str, Any]) -> str:
    """What a request of an arm takes beside the base model's, and whether that is more for sure."""
    low, high = arm["interval_to_base"]
    if low <= 1 <= high:
        sure = "as long, as far as can be told"
    else:
        sure = f"{100 * abs(arm['to_base'] - 1):.1f} % {'longer' if low > 1 else 'less'}"
    return f"takes {sure} ({arm['to_base']:.3f} times the base model's seconds, [{low:.3f}, {high:.3f}])"


def _of_policies(rows: Mapping[str, Row]) -> str:
    """Which policies beat always personal for sure, and which are worse for sure; and what follows."""
    better, worse = (_surely(_routed(rows), better=way) for way in (True, False))
    told = "No policy that chooses is better than always personal for sure (95 %, over users and prompts)"
    if better:
        told = f"Better than always personal for sure (95 %, over users and prompts): {_listed(better)}"
    worse_ = f"; worse for sure: {_listed(worse)}" if worse else ""
    off = "The router is off unless it is asked for" + ("." if better else ", and this is why.")
    return f"{told}{worse_}. {off}"


def _of_bytes(rows: Mapping[str, Row], arms: Mapping[str, Row]) -> str:
    """What the cheaper form saves by itself, and which policies save without a sure loss."""
    whole = arms[PERSONAL]["bytes"]
    cheaper, share = rows[CHEAPER], 100 * arms[CHEAPER]["bytes"] / whole
    told = (
        f"The cheaper form has {share:.0f} % of the bytes of the user's own and gives up"
        f" {cheaper['regret_personal']:.4f} {_ends(cheaper['interval_personal'])}"
    )
    worse = [row["policy"] for row in _surely(_routed(rows), better=False, both=False)]
    kept = [row for row in _routed(rows) if row["policy"] not in worse and row["bytes"] < whole]
    if not kept:
        return f"{told}. No policy touches fewer bytes without a sure loss."
    saving = [
        f"`{row['policy']}` ({100 * row['bytes'] / whole:.0f} %, {row['regret_personal']:+.4f}"
        f" {_ends(row['interval_personal'])}, {1e3 * row['deciding']:.1f} ms of deciding)"
        for row in kept
    ]
    return f"{told}. Fewer bytes without a sure loss: {', '.join(saving)}."


def _routed(rows: Mapping[str, Row]) -> list[Row]:
    """Of policies that choose."""
    return [row for name, row in rows.items() if name not in (ORACLE, PERSONAL, BASE, CHEAPER)]


def _surely(rows: Sequence[Row], *, better: bool, both: bool = True) -> list[Row]:
    """Those whose intervals over users and prompts lie beyond always personal: both, or one of them."""

    def sure(low: float | None, high: float | None) -> bool:
        return low is not None and high is not None and (high < 0 if better else low > 0)

    needed = all if both else any
    return [row for row in rows if needed(sure(*row[name]) for name in _AGAINST_PERSONAL)]


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(f"`{row['policy']}` ({row['regret_personal']:+.4f})" for row in rows)


def _turned(ends: Sequence[float | None]) -> list[float | None]:
    return [None if end is None else -end for end in reversed(ends)]


def _ends(ends: Sequence[float | None]) -> str:
    low, high = ends
    return "[]" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _policies(found: Mapping[str, Any]) -> str:
    """A row a policy: quality, seconds, arms, and what it gives up."""
    names = [arm["arm"] for arm in found["arms"]]
    lines = [
        [
            _NAMES[row["policy"]],
            f"{row['quality']:.4f}",
            f"{row['cost']:.3f}",
            f"{1e3 * row['deciding']:.1f}",
            f"{row['bytes']:,.0f}",
            " / ".join(f"{100 * row['arms'][name]:.0f}" for name in names),
            f"{row['regret_oracle']:.4f} {_ends(row['interval'])}",
            f"{row['regret_personal']:+.4f} {_ends(row['interval_personal'])}",
        ]
        for row in found["rows"]
    ]
    shares = " / ".join(names) + ", %"
    head = ["policy", "nats a token", "seconds a request", "of it deciding, ms", "bytes of the user's own"]
    return markdown([*head, shares, "over the oracle", "over always personal"], lines)


def _judged(found: Mapping[str, Any]) -> str:
    row, judged = found["rows"][0], found["judged"]
    return (
        f"{row['prompts']} prompts of {row['users']} users, {judged['folds']} parts, k ="
        f" {found['policies']['neighbours']}, tolerance {found['policies']['tolerance']};"
        f" {found['model']} in {found['dtype']['judged']}."
        f" Measuring and judging took {judged['seconds']:.0f} s. In brackets: 95 % over users."
    )


def _arms(found: Mapping[str, Any]) -> str:
    lines = []
    for arm in found["arms"]:
        made = {PERSONAL: found["bundle"], CHEAPER: found["cheaper"]}.get(arm["arm"])
        how = f"{made['method']}, error {made['relative_error']:.2f}" if made else ""
        low, high = arm["interval_to_base"]
        times = f"{arm['to_base']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append([arm["arm"], how, f"{arm['bytes']:,.0f}", f"{arm['seconds']:.3f}", times])
    return markdown(["arm", "made by", "bytes a user", "seconds a request", "of the base model's"], lines)


def _timed(found: Mapping[str, Any]) -> str:
    timed, dtype = found["timed"], found["dtype"]["timed"]
    return (
        f"The embedded engine, {dtype}, one request at a time: {timed['prompts']} prompts of"
        f" {timed['prompt_tokens']:.0f} tokens in the mean, {timed['new_tokens']} new tokens each, arms in"
        f" turns on the same prompts, the least of {timed['rounds']} rounds. No prompt is shared with an"
        " earlier request."
    )


def main() -> None:
    """Fill the page."""
    fill(blocks(), PAGE)
    print(f"written: the tables of {PAGE}")


if __name__ == "__main__":
    main()
