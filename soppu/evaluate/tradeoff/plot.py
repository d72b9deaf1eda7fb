"""The arms of a comparison in one picture: quality over each cost, drawn as on tradeoff.html."""

from __future__ import annotations

from soppu.evaluate.templates import template
from soppu.evaluate.tradeoff import fronts
from soppu.evaluate.tradeoff.schema import Tradeoff


def svg(found: Tradeoff, *, alone: bool = False) -> str:
    """SVG text of the loss, or the first score there is, over the costs; "" where nothing was measured.

    The same comparison gives the same text.

    Args:
        alone: whether it is a file of its own: no page around it says what its colours are.
    """
    metric, panels = next(iter(fronts.panels(found).items()), ("", []))
    if not panels:
        return ""
    unit = ", nats a token" if metric == "loss" else ""
    label = f"{metric.replace('_', ' ')}{unit}, of every arm over what it costs"
    picture = template("tradeoff/arms.svg.jinja")
    return picture.render(panels=panels, box=fronts, label=label, alone=alone).strip()
