"""Which of several choices nothing else beats in both cost and loss."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats, by rising cost: as good in both and better in one is to beat.

    Equal points stand or fall together. O(n log n).

    Args:
        points: (cost, loss) of each, both finite, lower is better in both.
    """
    found: list[int] = []
    best: tuple[float, float] | None = None  # the last point of the front
    for place in sorted(range(len(points)), key=lambda at: points[at]):
        if best is None or points[place][1] < best[1] or points[place] == best:
            found.append(place)
            best = points[place]
    return found
