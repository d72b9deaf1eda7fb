"""The arms of a comparison as points: quality over bytes, over latency and over memory, as SVG text."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soppu.evaluate.plots import BASE, COMPRESSED, PERSONAL, SHARED, draw
from soppu.evaluate.tradeoff.schema import Arm, Tradeoff

_COLOURS = {"base": BASE, "adapter": PERSONAL, "bundle": COMPRESSED, "centralised": SHARED}
_COSTS = (
    ("bytes_per_user", "kB a user on disk", 1e3),
    ("latency_ms_p50", "ms, one prompt alone (p50)", 1.0),
    ("memory_bytes", "MB of memory, peak", 1e6),
)


def svg(found: Tradeoff) -> str:
    """The figure for a page; "" where no arm has a loss. The same comparison gives the same text."""
    arms = [arm for arm in found.arms if arm.loss is not None]
    if not arms:
        return ""
    return draw(partial(_figure, arms), name="arms", label="Loss of every arm over what it costs")


def _figure(arms: list[Arm]) -> Figure:
    costs = [cost for cost in _COSTS if any(getattr(arm, cost[0]) is not None for arm in arms)]
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (field, label, unit) in zip(panels, costs, strict=True):
        _panel(axes, arms, field, unit)
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss, nats a token")
    panels[0].set_title("Held-out loss over cost (lower left is better)")
    return figure


def _panel(axes: Axes, arms: list[Arm], field: str, unit: float) -> None:
    for arm in arms:
        value = getattr(arm, field)
        if value is None or arm.loss is None:
            continue
        axes.plot(value / unit, arm.loss, "o", color=_COLOURS[arm.kind], markersize=5)
        at = (value / unit, arm.loss)
        axes.annotate(arm.name, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.25, y=0.15)


def standalone(svg: str) -> str:
    """The figure as a file of its own, which has no page around it to give it a background."""
    return svg.replace("<svg", '<svg style="background: #ffffff"', 1)
