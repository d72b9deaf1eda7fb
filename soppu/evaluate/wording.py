"""How a report's figures read in words: units, percentages, the certificate, the curl line.

The page and the terminal summary share these. Nothing here escapes HTML or Markdown.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from soppu import user_ids

NONE = "–"
_COMPLETION_TOKENS = 24
_NAMED = 10  # users spelt out in a sentence; the rest is counted


def printable(text: str) -> str:
    """The text on one line, control and invisible formatting characters shown as U+FFFD.

    User ids come from outside; in a terminal or an SVG such a character is more than a glyph.
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def who(user_id: str | None) -> str:
    """A user as people know them: "alice@example.com" for the id "alice%40example.com"."""
    return NONE if user_id is None else user_ids.name_of(user_id)


def shortened(text: str, *, limit: int) -> str:
    """Printable, and of at most `limit` characters."""
    shown = printable(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


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
    ways = {"base": user["loss_base"], "shared": user["loss_shared"]}
    chosen = ways.get(user["served"], user["loss_personal"])
    if None in (user["loss_base"], chosen, user["gain_kept"]):
        return NONE
    return percent(user["gain_kept"]) if chosen < user["loss_base"] else "no gain"


def adapter(user: Mapping[str, Any]) -> str:
    """What a user is asked as, or that there is nothing to ask for."""
    return "no adapter: the base model" if user["served"] == "base" else user["adapter_id"] or NONE


def served(report: Mapping[str, Any]) -> str:
    """How many users are served what: "6 personal, 2 shared, 0 base"."""
    counts = Counter(user["served"] for user in report["users"])
    words = [f"{counts[name]:,} {name}" for name in ("personal", "shared", "base")]
    current = f"{counts['current']:,} with the adapter they have"
    if counts["current"] == len(report["users"]):
        return current
    return ", ".join([*words, current] if counts["current"] else words)


def gains(report: Mapping[str, Any]) -> list[str]:
    """What was won, as sentences: over the base model, over the shared adapter, by personal training."""
    found = report["gains"]
    over = ((found["over_base"], "the base model"), (found["over_shared"], "the shared adapter"))
    told = [
        f"What is served wins {_nats(gain)} over {what} on the mean over {gain['users']:,} users, better"
        f" for {gain['better']:,}; the worst is {_worst(gain)}."
        for gain, what in over
        if gain
    ]
    if own := found["personal_over_shared"]:
        told.append(
            f"Personal adapters {_beats(own)}: {_nats(own)} on the mean, before compression, better for"
            f" {own['better']:,} of {own['users']:,} users; the worst is {_worst(own)}."
        )
    return told


def _beats(own: Mapping[str, Any]) -> str:
    """Only what the interval leaves no doubt of is claimed."""
    if own["mean"] <= 0:
        return "do not beat one shared adapter here"
    if own["low"] is None or own["low"] <= 0:
        return "are not shown to beat one shared adapter here"
    return "beat one shared adapter here"


def _worst(gain: Mapping[str, Any]) -> str:
    return f"{printable(who(gain['worst_user']))} ({gain['worst']:+.3f})"


def _nats(gain: Mapping[str, Any]) -> str:
    within = "" if gain["low"] is None else f" (95 % interval {gain['low']:+.3f} to {gain['high']:+.3f})"
    return f"{gain['mean']:+.3f} nats a token{within}"


def lost(report: Mapping[str, Any]) -> str:
    """Who would do better with the shared adapter than with what compression left of theirs; "" if nobody."""
    users = [printable(who(user["id"])) for user in report["users"] if user["compression_lost"]]
    if not users:
        return ""
    more = f" and {len(users) - _NAMED:,} more" if len(users) > _NAMED else ""
    return (
        "Compression lost what was won: on their validation text the shared adapter is better than the"
        f" compressed one of {', '.join(users[:_NAMED])}{more}."
    )


def measured_on(report: Mapping[str, Any]) -> str:
    """Which models the losses are of: "the full model", or how many users' on which."""
    counts = Counter(user["measured_on"] for user in report["users"] if user["measured_on"])
    if len(counts) < 2:
        return "".join(f"the {model}" for model in counts)
    return ", ".join(f"the {model} ({number:,} users)" for model, number in counts.most_common())


def patience(federation: Mapping[str, Any]) -> str:
    """What ended the shared rounds: patience, or their number."""
    done = sum(log["mode"] == "shared" for log in federation["rounds_log"])
    most = federation["max_shared_rounds"]
    if not done:
        return "no shared round"
    if done >= most:
        return f"{done} shared rounds, as many as are allowed"
    return (
        f"patience ended the shared rounds after {done} of at most {most}: {federation['patience']} in a row"
        " lowered neither loss"
    )


def nats(value: float | None) -> str:
    """A difference of losses, with its sign."""
    return NONE if value is None else f"{value:+.3f}"


def gain(told: Mapping[str, Any] | None) -> str:
    """A user's gain with its interval: "+0.031 (+0.010 to +0.052)"."""
    if told is None:
        return NONE
    within = "" if told["low"] is None else f" ({told['low']:+.3f} to {told['high']:+.3f})"
    return f"{told['mean']:+.3f}{within}"


def size(count: float) -> str:
    """Bytes in decimal units: 1234567 -> "1.23 MB"."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"


def forms(sent: Mapping[str, Any]) -> str:
    """How users' own adapters came back: "2 as ternary (9.1 kB up), 1 as float32 (310 kB up)"."""
    told = sorted(sent.items(), key=lambda item: -item[1]["users"])
    return ", ".join(f"{one['users']:,} as {form} ({size(one['bytes_up'])} up)" for form, one in told) or NONE


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


def smaller(compression: Mapping[str, Any]) -> str:
    """How much smaller the bundle is than the files as they were, and than 16 bits for each number."""
    on_disk = ratio(compression["bytes_before"], compression["bytes_after"])
    return f"{on_disk} smaller on disk, {compression['ratio_16_bit']:.2f}× than at 16 bits a number"


def errors(compression: Mapping[str, Any]) -> str:
    """The users' relative errors, as stored, in three figures."""
    error = compression["relative_error"]
    return (
        f"{percent(error['rms'])} root mean square, mean {percent(error['mean'])},"
        f" worst user {percent(error['max'])}"
    )


def made_by(compression: Mapping[str, Any]) -> str:
    """The method, what it had to reach, and the shared ranks that came out of it."""
    used = compression["k_used"].values()
    words = [compression["method"], *([f"target {compression['target']}"] if compression["target"] else [])]
    if not any(used):
        words.append("no shared basis")
    else:
        low, high = min(used), max(used)
        words.append(
            f"shared rank {low if low == high else f'{low} to {high}'} of {compression['k']} allowed"
        )
    words += [f"{compression['clusters']} clusters"] if compression["clusters"] > 1 else []
    words += ["errors weighed by calibration"] if compression["whitened"] else []
    return ", ".join(words)


def refit(report: Mapping[str, Any]) -> list[str]:
    """Whether the basis of users' cores is due for a refit, by which figures; nothing where there is none."""
    told = report.get("basis")
    if not told:
        return []
    basis_id, probes = told["basis_id"], len(told["probes"])
    if not probes:
        if before := told["grown_from"]:
            came = f"grew out of {before}, which was due for a refit"
            return [f"basis {basis_id} {came}; nobody trained freely since"]
        return [f"basis {basis_id}: nobody trained freely beside it, so nothing says whether it still fits"]
    kept = f", their cores keep {percent(told['gain_kept'])} of their gain" if told["measured"] else ""
    many = "probe" if probes == 1 else "probes"
    figures = f"{probes} {many}, relative error {percent(told['error_mean'])} in it{kept}"
    due = "is DUE FOR A REFIT" if told["due"] else "still fits"
    return [f"basis {basis_id} {due}: {figures}", *(f"  - {reason}" for reason in told["reasons"])]


def certificate(compression: Mapping[str, Any]) -> str:
    """The certificate as sentences: what the shared bases leave by themselves, and the best would.

    It says nothing of the users' own numbers, which a bundle may keep beside the bases.
    """
    part = compression["certificate"]
    least, reached = part["relative_lower_bound"], part["relative_achieved"]
    if not any(compression["k_used"].values()):
        return "No module has a shared basis, so there is none to certify: every adapter is kept by itself."
    if least is None or reached is None:
        return "The bounds of this compression are not finite; nothing is certified."
    weighed = ", inputs weighed by calibration" if compression["whitened"] else ""
    sentences = [
        "With a core for every user and no number of a user's own, the shared bases leave a relative error of"
        f" {percent(reached, digits=2)} (root mean square over modules and users, all adapters of a module"
        f" weighing the same{weighed}). {_bound(compression)}"
    ]
    if part["upper_bound"] is not None and part["upper_bound"] < part["total"]:
        guaranteed = math.sqrt(part["upper_bound"] / part["total"])
        sentences.append(f"The closed-form start alone guarantees {percent(guaranteed, digits=2)} or better.")
    if compression["method"] == "residual":
        sentences.append(
            "Numbers of the users' own lie beside the bases: the error as stored may be far lower."
        )
    return " ".join(sentences)


def bounded(compression: Mapping[str, Any]) -> bool:
    """Whether the certificate has a bound: there are shared bases, and everybody is in the same ones."""
    return compression["clusters"] == 1 and any(compression["k_used"].values())


def _bound(compression: Mapping[str, Any]) -> str:
    part = compression["certificate"]
    least, reached = part["relative_lower_bound"], part["relative_achieved"]
    if not bounded(compression):
        return "How much less other groups of users and their bases could leave is not known."
    doubt = 1 - part["confidence"]
    sure = f" (this holds with a probability of 1 - {doubt:.1g} or more)" if doubt > 0 else ""
    return (
        f"No bases of the ranks used can leave less than {percent(least, digits=2)}, whatever the"
        f" method{sure}: better bases could gain {100 * max(reached - least, 0.0):.2f} percentage points at"
        " most."
    )


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    steps = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in steps]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def curl(report: Mapping[str, Any]) -> str:
    """A shell line that asks the server for one user's text, quoted for a POSIX shell; "" if unserved."""
    serving, users = report["serving"], report["users"]
    if not serving or not users:
        return ""
    inside = [user["id"] for user in users if user["served"] != "base"]  # nobody else is known there
    user = next(iter([*serving["completions"], *inside]), "")
    asked_as = serving["asked_as"].get(user, user)
    path, body = _asked(serving["target"], asked_as, serving["prompt"])
    words = (shlex.quote(f"{serving['url'].rstrip('/')}{path}"), shlex.quote(json.dumps(body)))
    return f"curl -s {words[0]} -H 'Content-Type: application/json' -d {words[1]}"


def _asked(target: str, user: str, prompt: str) -> tuple[str, dict[str, Any]]:
    """Path and body of a request for one user's text, as this kind of server takes it."""
    if target == "vllm":
        return "/v1/completions", {"model": user, "prompt": prompt, "max_tokens": _COMPLETION_TOKENS}
    return "/generate", {
        "inputs": prompt,
        "parameters": {"adapter_id": user, "max_new_tokens": _COMPLETION_TOKENS},
    }
