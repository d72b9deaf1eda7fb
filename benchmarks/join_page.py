"""The table of a user who joins, of join.json, for docs/personal.md."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import circumstances_line, markdown


def told(found: dict[str, Any]) -> str:
    """The parts of one join in seconds, alone and beside others' requests, and what happened to these."""
    alone, loaded = found["alone"], found["under_load"]
    parts = [key for key in alone if key.endswith("_s") and key != "total_s"]
    rows = [[_words(key), f"{alone[key]:.1f}", f"{loaded[key]:.1f}"] for key in [*parts, "total_s"]]
    table = markdown(["seconds", "quiet server", "server under load"], rows)
    losses, load = alone["losses"], loaded["load"]
    words = (
        f"A user of the built-in corpus joins {found['fleet']['users']} users of SmolLM2-135M, method"
        f" {found['fleet']['method']}, k = {found['fleet']['k']}: {alone['steps']} steps,"
        f" {alone['numbers']:,} numbers, a row of {alone['row_bytes']:,} bytes. Held out: base"
        f" {losses['base']:.3f}, shared {losses['shared']:.3f}, the core {losses['compressed']:.3f} nats a"
        f" token. The second one joins while {loaded['clients']} clients ask: of {loaded['requests']}"
        f" requests {loaded['failed']} failed and {loaded['wrong_user']} had another user's answer;"
        f" {loaded['not_as_before']} differ from what their user had said before the load"
        f" ({loaded['answers_that_tell_their_user']:.0%} of the answers tell whose they are). An answer took"
        f" {load['before_median_s']:.2f} s before, and {load['meanwhile_median_s']:.2f} s while training had"
        f" its share of the two cores, the longest {load['meanwhile_longest_s']:.1f} s."
    )
    return f"{table}\n\n{words}\n\n{circumstances_line(found)}"


def _words(key: str) -> str:
    return "all of it" if key == "total_s" else key.removesuffix("_s").replace("_", " ")
