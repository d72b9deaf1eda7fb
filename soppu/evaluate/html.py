"""report.html: one page that needs nothing but itself. No scripts, no links to anywhere, every text escaped.

It shows what report.json holds and works nothing out that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from soppu.evaluate import plots
from soppu.evaluate.wording import (
    NONE,
    bounded,
    certificate,
    curl,
    duration,
    forms,
    gain_kept,
    loss,
    made_by,
    percent,
    printable,
    short,
    size,
    smaller,
)

Row = Mapping[str, Any]

_FOLDED = 24  # rows above which a table starts folded
_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2329; --muted: #59636f; --line: #d1d9e1;
  --base: #8c959e; --personal: #0072b2; --compressed: #e69f01; --good: #00694b; --bad: #a63d00;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9aa4af;
  --line: #39414b; --base: #8c959e; --personal: #56b4e9; --compressed: #e69f01; --good: #4cc29a;
  --bad: #ff9b63; --card: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.quiet { color: var(--muted); }
.verdict { display: inline-block; padding: .1rem .6rem; border: 1px solid; border-radius: 1rem;
  font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.w { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
summary { cursor: pointer; padding: .3rem 0; }
"""
# Nothing may be loaded or run, even if a text should ever get past the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Row) -> str:
    """The whole page. The same report gives the same text."""
    drawn = plots.figures(report)
    parts = [
        _head(report),
        _gate(report["gate"]),
        _users(report["users"], drawn.get("losses", "")),
        _compression(report["compression"], drawn),
        _federation(report),
        _serving(report),
        _stages(report["stages"], drawn.get("stages", "")),
    ]
    title = _text(f"SOPPU run {report['run']}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _head(report: Row) -> str:
    facts = {
        "base model": report["base_model"],
        "created": report["created"],
        "users": f"{len(report['users']):,}",
        "hardware": report["hardware"],
        "soppu": report["soppu"],
        "configuration": f"{report['config_digest']}, seed {report['seed']}",
    }
    return f"<h1>SOPPU run {_text(report['run'])}</h1>\n{_facts(facts)}"


def _gate(gate: Row) -> str:
    mark = ("good", "passed") if gate["passed"] else ("bad", "refused")
    reasons = "".join(f'<li class="bad">{_text(reason)}</li>' for reason in gate["reasons"])
    rules = (
        ("gain kept by all users", "mean_gain_kept", "", "at least", "min_mean_gain_kept"),
        ("least gain kept by a user", "worst_gain_kept", "worst_user", "at least", "min_user_gain_kept"),
        ("largest relative error", "max_relative_error", "worst_error_user", "at most", "max_relative_error"),
        ("users their adapter helps", "improved_share", "", "at least", "min_improved_users"),
    )
    rows = [
        (
            what,
            percent(gate[value]),
            gate[whose] if whose else NONE,
            f"{sense} {percent(gate['limits'].get(key))}",
            f"gate.{key}",
        )
        for what, value, whose, sense, key in rules
    ]
    unmeasured = ", ".join(gate["unmeasured"][:_FOLDED])
    more = f" and {rest} more" if (rest := len(gate["unmeasured"]) - _FOLDED) > 0 else ""
    note = f"Without held-out text, judged by their relative error alone: {unmeasured}{more}"
    return (
        f'<h2>Gate</h2>\n<p><span class="verdict {mark[0]}">{mark[1]}</span></p>'
        + (f"<ul>{reasons}</ul>" if reasons else "")
        + _table(("rule", "value", "user", "limit", "key"), rows, right=(1, 3), free=2)
        + (f"<p>{_text(note)}</p>" if unmeasured else "")
    )


def _users(users: Sequence[Row], figure: str) -> str:
    rows = [
        (
            user["id"],
            f"{user['examples']:,}",
            loss(user["loss_base"]),
            loss(user["loss_personal"]),
            loss(user["loss_compressed"]),
            gain_kept(user),
            percent(user["relative_error"]),
            user["adapter_id"],
        )
        for user in users
    ]
    heads = ("user", "examples", "base", "personal", "compressed", "gain kept", "rel. error", "adapter")
    note = "Losses are means over a user's held-out text, in nats a token. Gain kept: 100 % is lossless."
    table = _table(heads, rows, right=range(1, 7), free=0, fold=f"all {len(rows)} users")
    return f'<h2>Users</h2>\n{_figure(figure)}<p class="quiet">{note}</p>{table}'


def _compression(made: Row, drawn: Mapping[str, str]) -> str:
    error = made["relative_error"]
    facts = {
        "method": f"{made_by(made)}; stored as {made['dtype']}, fitted on {made['device']}",
        "on disk": f"{size(made['bytes_before'])} of adapters, {size(made['bytes_after'])} of bundle:"
        f" {smaller(made)}",
        "parameters": f"{made['parameters_before']:,} before, {made['parameters_after']:,} after",
        "relative error": f"root mean square {percent(error['rms'])}, mean {percent(error['mean'])},"
        f" worst user {percent(error['max'])}",
        "bundle": made["bundle_id"] or NONE,
        "set": made["set_id"] or NONE,
    }
    rows = [_module_row(made, name) for name in made["by_module"]]
    heads = ("module", "k used", "steps", "mean error", "worst error", "bases alone", "lower bound")
    table = _table(heads, rows, right=range(1, 7), fold=f"all {len(rows)} modules")
    return (
        f"<h2>Compression</h2>\n{_facts(facts)}<p>{_text(certificate(made))}</p>"
        f"{_figure(drawn['sizes'])}{_figure(drawn.get('errors', ''))}"
        '<p class="quiet">Bars are means over users; dots are users. With many users a thin line spans all of'
        " them, a thick one the middle 80 %. Bases alone, and the bound for bases of these ranks, leave out"
        f" numbers of the users' own.</p>{table}"
    )


def _module_row(made: Row, name: str) -> tuple[str, ...]:
    errors = [value for value in made["by_module"][name].values() if value is not None]
    # a module without a basis has nothing to certify
    part = made["certificate"]["modules"].get(name, {}) if made["k_used"].get(name) else {}
    return (
        name,
        str(made["k_used"].get(name, NONE)),
        str(made["steps"].get(name, NONE)),
        percent(math.fsum(errors) / len(errors) if errors else None),
        percent(max(errors, default=None)),
        percent(_relative(part, "achieved")),
        percent(_relative(part, "lower_bound") if bounded(made) else None),
    )


def _relative(part: Row, name: str) -> float | None:
    """A squared error of unit-norm adapters as a root-mean-square relative error."""
    value, total = part.get(name), part.get("total")
    return math.sqrt(max(value, 0.0) / total) if total and value is not None else None


def _federation(report: Row) -> str:
    told = report["federation"]
    if told is None:
        why = "None: adapters from earlier runs were compressed again."
        return f'<h2>Federation</h2>\n<p class="quiet">{why}</p>'
    rows = [
        (
            str(log["round"]),
            log["mode"],
            size(log["bytes_down"]),
            size(log["bytes_up"]),
            duration(log["seconds"]),
            loss(log["train_loss"]),
            loss(log["emulator_loss"]),
            str(len(log["accepted"])),
            "; ".join(f"{user}: {why}" for user, why in log["refused"].items()) or NONE,
        )
        for log in told["rounds_log"]
    ]
    heads = ("round", "mode", "down", "up", "time", "train loss", "held-out", "users", "refused")
    facts = {
        "traffic": f"{size(told['bytes_down'])} down to the clients, {size(told['bytes_up'])} up,"
        f" in {duration(told['seconds'])}",
        "own adapters": forms(told["forms"]),
        **_plan_facts(report),
    }
    refused = [f"<li>{_text(user)}: {_text(why)}</li>" for user, why in told["refused"].items()]
    left_out = f"<h3>Without an adapter from this run</h3><ul>{''.join(refused)}</ul>" if refused else ""
    table = _table(heads, rows, right=(0, 2, 3, 4, 5, 6, 7), free=8)
    return f"<h2>Federation</h2>\n{_facts(facts)}{table}{left_out}"


def _plan_facts(report: Row) -> dict[str, str]:
    facts = {}
    if plan := report["plan"]:
        facts["emulator"] = f"keeps layers {_ranges(plan['kept'])}"
        facts["adapter layers"] = _ranges(plan["adapter_layers"])
        facts["layer plan"] = plan["hash"]
    if align := report["align"]:
        before, after = align["before"], align["after"]
        facts["alignment"] = (
            f"hidden-state error {short(before['l2'])} before, {short(after['l2'])} after;"
            f" KL {short(before['kl'])} before, {short(after['kl'])} after (nats a token)"
        )
    return facts


def _serving(report: Row) -> str:
    serving = report["serving"]
    if serving is None:
        return '<h2>Serving</h2>\n<p class="quiet">Not published.</p>'
    failed = {user: why for user, why in serving["canaries"].items() if why}
    asked = len(serving["canaries"])
    facts = {
        "target": serving["target"],
        "server": serving["url"],
        "bundle": serving["bundle_id"],
        "canaries": f"{asked - len(failed)} of {asked} users answered as they should",
    }
    faults = "".join(f'<li class="bad">{_text(user)}: {_text(why)}</li>' for user, why in failed.items())
    prompt = _text(serving["prompt"], lines=True)
    samples = "".join(
        f"<h3>{_text(user)}</h3><pre>{prompt}<b>{_text(told, lines=True)}</b></pre>"
        for user, told in serving["completions"].items()
    )
    return (
        f"<h2>Serving</h2>\n{_facts(facts)}{f'<ul>{faults}</ul>' if faults else ''}"
        f"<pre>{_text(curl(report))}</pre>{samples}"
    )


def _stages(stages: Sequence[Row], figure: str) -> str:
    if not stages:
        return ""
    rows = [(stage["name"], duration(stage["seconds"]), str(stage["attempts"])) for stage in stages]
    return f"<h2>Stages</h2>\n{_figure(figure)}{_table(('stage', 'time', 'attempts'), rows, right=(1, 2))}"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Iterable[int] = (),
    free: int = -1,
    fold: str = "",
) -> str:
    """A table; columns in `right` hold numbers, column `free` text of any length.

    A long table starts folded under the words of `fold`.
    """
    marks = dict.fromkeys(right, ' class="n"') | {free: ' class="w"'}

    def line(cells: Sequence[str], tag: str) -> str:
        inner = (f"<{tag}{marks.get(at, '')}>{_text(cell)}</{tag}>" for at, cell in enumerate(cells))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    inside = f"<thead>{line(heads, 'th')}</thead><tbody>\n{body}</tbody>"
    table = f'<div class="scroll"><table>{inside}</table></div>'
    if fold and len(rows) > _FOLDED:
        return f"<details><summary>{_text(fold)}</summary>{table}</details>"
    return table


def _text(text: str, *, lines: bool = False) -> str:
    """Escaped for elements and attributes; control characters made visible, line breaks kept if asked."""
    if not lines:
        return escape(printable(text))
    return escape("\n".join(map(printable, text.expandtabs(4).splitlines())))


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
