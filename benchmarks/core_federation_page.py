"""What docs/federation.md says of cores, in words: from benchmarks/results/core_federation.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.pages import circumstances_line, markdown
from benchmarks.record import ROOT
from soppu import config as configuration
from soppu.stages import choosing


def told(found: Mapping[str, Any]) -> str:
    """The Markdown between the marks, of the parts that were measured."""
    parts = [*_demos(found), *_many(found)]
    return "\n\n".join([*parts, circumstances_line(found)])


def _demos(found: Mapping[str, Any]) -> list[str]:
    ways = {"embedded": "as configured", "float32": "in float32", "vllm": "as configured, served by vLLM"}
    rows = [_row(words, one) for name, words in ways.items() if (one := found.get(f"demo_{name}"))]
    if not rows:
        return []
    head = [
        "`configs/basis.toml`",
        "users",
        "gain kept",
        "worst user",
        "bundle",
        "gate",
        "answers",
        "minutes",
    ]
    first = found["demo_embedded"]
    up, smaller = first["bytes_up_a_user"], first["smaller"]
    rounds = first.get("basis_rounds", 0)
    learnt = f", in each of {rounds} rounds of the basis gradients of {_kb(up['basis'])}" if rounds else ""
    wire = (
        f"Up goes, in a shared round, a LoRA of {_kb(up['float32'])} a user of the cohort{learnt}; at the end"
        f" a core of {_kb(up['core'])} a user: {smaller:.1f} times less than the LoRA, all of the reply"
        f" counted. The basis went down once to each node, {_kb(first['bytes_basis'])} in all."
    )
    return [markdown(head, rows), wire, _gains(first["users"])]


def _gains(users: Mapping[str, Mapping[str, Any]]) -> str:
    """What those of the cohort and the others won over the adapter that the cohort shared."""
    cohort = set(choosing.cohort(configuration.load(ROOT / "configs" / "basis.toml")))
    parts = []
    for words, whose in (("the cohort's cores", cohort), ("the others'", users.keys() - cohort)):
        won = [users[user]["loss_shared"] - users[user]["loss_compressed"] for user in whose & users.keys()]
        better = sum(gain > 0 for gain in won)
        parts.append(f"{words} {statistics.mean(won):+.3f} (better for {better} of {len(won)})")
    return f"Won over the adapter that the cohort shared, held out, nats a token, mean: {'; '.join(parts)}."


def _row(words: str, one: Mapping[str, Any]) -> list[str]:
    gate = one["gate"]
    return [
        words,
        str(len(one["users"])),
        f"{100 * gate['mean_gain_kept']:.2f} %",
        f"{100 * gate['worst_gain_kept']:.2f} %",
        _kb(one["bytes_after"]),
        "passed" if gate["passed"] else "refused",
        "every user" if one["canaries_ok"] else "not all",
        f"{one['minutes']:.1f}",
    ]


def _many(found: Mapping[str, Any]) -> list[str]:
    many, few = found.get("many"), found.get("few")
    if not many or not few:
        return []
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in many["seconds_by_stage"].items())
    quarters = ", ".join(f"{size / 1e9:.2f}" for size in many["median_bytes_by_quarter_of_cores"])
    return [
        f"{many['users']} simulated users of a random model of four layers, from the command to the served"
        f" tokens: {many['minutes']:.1f} minutes ({stages}). All processes together held at most"
        f" {many['peak_bytes'] / 1e9:.2f} GB, {found['peak_ratio']:.2f} times what {few['users']} users took;"
        f" while cores were trained, the medians of quarters are {quarters} GB."
    ]


def _kb(size: float) -> str:
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:.2f} MB"
