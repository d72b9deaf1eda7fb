"""The front against every point held to every other."""

from __future__ import annotations

import random

from soppu.evaluate.tradeoff.pareto import front


def _beaten(points: list[tuple[float, float]], at: int) -> bool:
    """Whether any other is as good in both and better in one."""
    cost, loss = points[at]
    return any(c <= cost and o <= loss and (c, o) != (cost, loss) for c, o in points)


def test_the_front_is_what_no_other_point_beats() -> None:
    draw = random.Random(0)
    for size in range(12):
        for _ in range(60):
            points = [(float(draw.randrange(5)), float(draw.randrange(5))) for _ in range(size)]
            found = front(points)
            assert sorted(found) == [at for at in range(size) if not _beaten(points, at)]
            assert [points[at] for at in found] == sorted(points[at] for at in found)
