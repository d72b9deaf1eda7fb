"""Where the arms stand in a panel of quality over cost: points, ticks, and the front, in SVG units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.ticker import LogLocator, MaxNLocator

from soppu.evaluate.tradeoff import table
from soppu.evaluate.tradeoff.pareto import front
from soppu.evaluate.tradeoff.schema import LOWER_IS_BETTER, Arm, Tradeoff
from soppu.evaluate.wording import size
from soppu.tradeoff_settings import METRICS

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 300, 14, 206  # of the plot; names of arms reach to the right of it
_WIDE = 20  # times from the least to the most, above which a cost is drawn in logarithms
_APART, _NAME = 12.0, 90.0  # height and width of a name, about
_UNITS = ((1e6, "MB"), (1e3, "kB"), (1, "B"))
_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bytes_per_user", "bytes a user on disk", size),
    ("latency_ms_p50", "latency, p50 of one prompt alone", "{:,.0f} ms".format),
    ("memory_bytes", "memory, peak", size),
)


@dataclass(frozen=True)
class Point:
    """An arm: where it stands, where its name stands, and what is told of it."""

    arm: Arm
    x: float
    y: float
    name_y: float
    on_front: bool
    told: str


@dataclass(frozen=True)
class Panel:
    """One metric over one cost."""

    metric: str
    label: str
    better: str  # "lower" or "higher"
    points: list[Point]
    line: str  # SVG path of the front, in steps: between two arms there is nothing to be had
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def panels(found: Tradeoff) -> dict[str, list[Panel]]:
    """Of every metric that any arm has, its panels over the costs that were measured."""
    shown: dict[str, list[Panel]] = {}
    for metric in METRICS:
        for cost in _COSTS:
            arms = [arm for arm in found.arms if None not in (getattr(arm, metric), getattr(arm, cost[0]))]
            if arms:
                shown.setdefault(metric, []).append(_panel(arms, metric, cost))
    return shown


def _panel(arms: Sequence[Arm], metric: str, cost: tuple[str, str, Callable[[float], str]]) -> Panel:
    field, label, tell = cost
    costs = [float(getattr(arm, field)) for arm in arms]
    scores = [float(getattr(arm, metric)) for arm in arms]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    best = front([(price, sign * score) for price, score in zip(costs, scores, strict=True)])
    log = _spans(costs)
    across, x_ticks = _logarithmic(costs) if log else _linear(costs, LEFT, RIGHT)
    up, y_ticks = _linear(scores, BOTTOM, TOP)
    places = [(across(price), up(score)) for price, score in zip(costs, scores, strict=True)]
    points = [
        Point(arm, *place, name_y, at in best, told(arm))
        for at, (arm, place, name_y) in enumerate(zip(arms, places, _names(places), strict=True))
    ]
    return Panel(
        metric,
        label,
        "lower" if sign > 0 else "higher",
        points,
        _steps([places[at] for at in best]),
        [(across(tick), tell(tick) if log else _plain(field, tick, max(costs))) for tick in x_ticks],
        [(up(tick), f"{round(tick, 9):g}") for tick in y_ticks],
    )


def told(arm: Arm) -> str:
    """All that was measured of an arm, a line a figure."""
    return "\n".join([arm.name, *_figures(arm)])


def _figures(arm: Arm) -> Iterator[str]:
    for metric in METRICS:
        if (value := getattr(arm, metric)) is not None:
            won = arm.intervals.get(metric)  # type: ignore[call-overload]
            over = f", {table.gain(won)} over {won.over}" if won else ""
            yield f"{metric.replace('_', ' ')}: {table.told(metric, value)}{over}"
    for field, label, tell in _COSTS:
        if (value := getattr(arm, field)) is not None:
            yield f"{label}: {tell(value)}"
    if arm.relative_error is not None:
        yield f"relative error: {arm.relative_error:.3f}"
    if arm.bundle_id:
        yield f"bundle: {arm.bundle_id}"


def _spans(costs: Sequence[float]) -> bool:
    known = [value for value in costs if value > 0]
    return bool(known) and max(known) >= _WIDE * min(known)


def _plain(field: str, tick: float, most: float) -> str:
    """A tick with all its digits: memory may differ in the fourth."""
    if not field.endswith("ms_p50"):
        unit, name = next(one for one in _UNITS if most >= one[0] or one[0] == 1)
        return f"{round(tick / unit, 6):g} {name}"
    return f"{round(tick, 6):g} ms"


def _logarithmic(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """Nothing at all, as the base model has on disk, stands at the left end."""
    known = [value for value in values if value > 0]
    start = LEFT + 30 if 0 in values else LEFT
    low, high = math.log10(min(known)) - 0.1, math.log10(max(known)) + 0.1

    def at(value: float) -> float:
        return start + (RIGHT - start) * (math.log10(value) - low) / (high - low) if value > 0 else LEFT + 6

    ticks = [float(tick) for tick in LogLocator(numticks=5).tick_values(10**low, 10**high)]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return at, [0.0, *inside] if 0 in values else inside


def _linear(
    values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high)]
    return (lambda value: start + (end - start) * (value - low) / (high - low)), [
        tick for tick in ticks if low <= tick <= high
    ]


def _names(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of the names beside points, off the nearer edge where one would stand on another."""
    heights = [y for _, y in places]
    up = [y > (TOP + BOTTOM) / 2 for y in heights]
    set_down: list[int] = []
    for place in sorted(range(len(places)), key=lambda at: -heights[at] if up[at] else heights[at]):
        step = -_APART if up[place] else _APART
        near = [at for at in set_down if abs(places[place][0] - places[at][0]) < _NAME]
        while any(abs(heights[place] - heights[at]) < _APART for at in near):
            heights[place] += step
        set_down.append(place)
    return heights


def _steps(places: Sequence[tuple[float, float]]) -> str:
    first, *rest = places
    moves = "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
    return f"M{first[0]:.1f} {first[1]:.1f}{moves}H{RIGHT}"
