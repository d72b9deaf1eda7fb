"""What joins leave in their run's folder, and what is read of it: which bundle became which."""

from __future__ import annotations

from typing import Any

from soppu.stages.run import Run

BEFORE, TEXT = "before", "text"  # the bundle that a user was added to; the digest of their text


def file_of(user: str, core_id: str) -> str:
    """The file of a run folder that tells of one join."""
    return f"join-{user}-{core_id}.json"


def noted(run: Run) -> list[dict[str, Any]]:
    """What every join of the run has left, in the order it was written. O(joins)."""
    found = sorted(run.folder.glob("join-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [run.read(path.name) for path in found]


def came_of(run: Run, bundle_id: str) -> set[str]:
    """The bundles that are this one and users who joined since, itself among them. O(joins)."""
    after: dict[str, set[str]] = {}
    for told in noted(run):
        after.setdefault(told.get(BEFORE, ""), set()).add(told["bundle_id"])
    found, new = set[str](), {bundle_id}
    while new:
        found |= new
        new = {made for one in new for made in after.get(one, ())} - found
    return found


def earlier(run: Run, user: str, *, text: str, own_rank: int, held: str) -> dict[str, Any] | None:
    """What a join of the user by the same text has left that came to the adapter they hold in a bundle."""
    wanted = {"user": user, TEXT: text, "own_rank": own_rank, "adapter_id": held}
    return next((told for told in noted(run) if wanted.items() <= told.items()), None)
