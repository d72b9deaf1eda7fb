"""The tables of docs/personal.md, from benchmarks/results: users trained together, and a user who joins.

python -m benchmarks.personal_page
"""

from __future__ import annotations

from typing import Any

from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "personal.md"
_NAMES = {"tiny": "random model of width 32, two layers", "smollm2": "last four layers of SmolLM2-135M"}
NOT_YET = "Not recorded yet."


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there."""
    made = {"batched": _batched, "join": _join}
    return {name: write(found) if (found := read_result(name)) else NOT_YET for name, write in made.items()}


def _batched(found: dict[str, Any]) -> str:
    head = ["trained", "users", "core", "user-steps a second, one by one", "at once", "ratio", "losses apart"]
    rows = [
        [
            _NAMES[name],
            str(one["users"]),
            " x ".join(map(str, one["core"])),
            f"{one['user_steps_a_second_one_by_one']:.1f}",
            f"{one['user_steps_a_second']:.1f}",
            f"{one['ratio']:.1f}",
            f"{one['max_loss_difference']:.1e}",
        ]
        for name, one in found["sizes"].items()
    ]
    return f"{markdown(head, rows)}\n\n{circumstances_line(found)}"


def _join(found: dict[str, Any]) -> str:
    alone, loaded = found["alone"], found["under_load"]
    parts = [key for key in alone if key.endswith("_s") and key != "total_s"]
    rows = [[_words(key), f"{alone[key]:.1f}", f"{loaded[key]:.1f}"] for key in [*parts, "total_s"]]
    table = markdown(["seconds", "quiet server", "server under load"], rows)
    losses, load = alone["losses"], loaded["load"]
    told = (
        f"A user of the built-in corpus joins {found['fleet']['users']} users of SmolLM2-135M, method"
        f" {found['fleet']['method']}, k = {found['fleet']['k']}: {alone['steps']} steps,"
        f" {alone['numbers']:,} numbers, a row of {alone['row_bytes']:,} bytes. Held out: base"
        f" {losses['base']:.3f}, shared {losses['shared']:.3f}, the core {losses['compressed']:.3f} nats a"
        f" token. The second one joins while {loaded['clients']} clients ask: of {loaded['requests']} requests"
        f" {loaded['failed']} failed and {loaded['wrong_user']} had another user's answer;"
        f" {loaded['not_as_before']} differ from what their user had said before the load"
        f" ({loaded['answers_that_tell_their_user']:.0%} of the answers tell whose they are). An answer took"
        f" {load['before_median_s']:.2f} s before, and {load['meanwhile_median_s']:.2f} s while training had"
        f" its share of the two cores, the longest {load['meanwhile_longest_s']:.1f} s."
    )
    return f"{table}\n\n{told}\n\n{circumstances_line(found)}"


def _words(key: str) -> str:
    return "all of it" if key == "total_s" else key.removesuffix("_s").replace("_", " ")


if __name__ == "__main__":
    fill(blocks(), PAGE)
