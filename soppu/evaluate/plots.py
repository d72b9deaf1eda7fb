"""The report's four figures, as SVG text to be put into the page.

Drawn on matplotlib Figure objects; pyplot is not used. Style settings hold only while a figure is drawn, but
matplotlib keeps them in one place, so two threads should not draw at once. The same report gives the same
bytes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soppu.evaluate.wording import duration, printable, ratio, size
from soppu.module_names import split_layer

FEW = 24
"""Up to this many users are drawn one by one, more as distributions."""

# Blue, orange and grey of Okabe and Ito: apart for every common colour blindness, and in brightness.
INK, MUTED, LINE = "#1f2329", "#59636f", "#d1d9e1"
BASE, PERSONAL, COMPRESSED = "#8c959e", "#0072b2", "#e69f01"
_REST = (PERSONAL, COMPRESSED, "#009e73", "#cc79a7", "#d55e00", "#56b4e9", BASE)
# The page sets these variables, once for light and once for dark.
_THEME = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    BASE: "base",
    PERSONAL: "personal",
    COMPRESSED: "compressed",
}
_WIDTH = 9.0  # inches; the page scales it
_BARS = 40  # modules above which the panels of errors stand below each other
_LABEL = 16  # characters of a name beside a bar
_FONT = "DejaVu Sans"  # comes with matplotlib; what texts are measured with
_STYLE: dict[str, Any] = {
    "font.family": [_FONT],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names come from outside
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}

Row = Mapping[str, Any]


def figures(report: Row) -> dict[str, str]:
    """Every figure the report has data for: name -> SVG text."""
    drawings: dict[str, tuple[str, Callable[[], Figure]]] = {}
    if users := [user for user in report["users"] if user["loss_base"] is not None]:
        drawings["losses"] = ("Held-out loss and gain of every user", lambda: losses(users))
    if modules := report["compression"]["by_module"]:
        drawings["errors"] = ("Relative reconstruction error by layer", lambda: errors(modules))
    drawings["sizes"] = ("Parameters and bytes before and after", lambda: sizes(report["compression"]))
    if stages := report["stages"]:
        drawings["stages"] = ("Seconds a stage took", lambda: stage_times(stages))
    return {name: draw(figure, name=name, label=label) for name, (label, figure) in drawings.items()}


def style(name: str = "soppu") -> AbstractContextManager[None]:
    """The defaults of matplotlib with this report's settings on top, for as long as the block runs."""
    return matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}])


def draw(figure: Callable[[], Figure], *, name: str, label: str) -> str:
    """SVG text of a figure: ids begin with `name`, colours are the page's variables, no metadata."""
    out = StringIO()
    with style(name), warnings.catch_warnings():
        # The browser has fonts for what the measuring font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure().savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    text = text.replace(f"'{_FONT}'", f"system-ui, '{_FONT}', sans-serif")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def losses(users: Sequence[Row]) -> Figure:
    """Loss three ways above, gain over the base model below: bars for few users, sorted curves for many."""
    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    base, personal, compressed = (
        [_or_nan(user[f"loss_{name}"]) for user in users] for name in ("base", "personal", "compressed")
    )
    gains = [[b - value for b, value in zip(base, values, strict=True)] for values in (personal, compressed)]
    if len(users) <= FEW:
        _bars(above, {"base": base, "personal": personal, "compressed": compressed})
        _bars(below, {"personal": gains[0], "compressed": gains[1]})
        _name_users(above, [])
        _name_users(below, [user["id"] for user in users])
    else:
        _quantiles(above, {"base": base, "personal": personal, "compressed": compressed})
        _sorted_gains(below, *gains)
    above.set_title("Held-out loss, three ways (lower is better)")
    above.set_ylabel("nats a token")
    below.set_title("Gain over the base model (higher is better)")
    below.set_ylabel("nats a token")
    below.axhline(0, color=MUTED, linewidth=0.8)
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    return figure


def errors(by_module: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Mean relative error by layer, one panel for q_proj, v_proj and the rest; users as dots or as ranges."""
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for module, values in by_module.items():
        panel, kind, layer = _place(module)
        panels.setdefault(panel, {}).setdefault(kind, {})[layer] = [
            v for v in values.values() if v is not None
        ]
    names = [name for name in ("q_proj", "v_proj", "the rest") if name in panels]
    stacked = len(by_module) > _BARS
    weights = [1.0 if stacked else max(1.0, 0.7 * len(panels[name])) for name in names]
    figure = Figure(figsize=(_WIDTH, 2.4 * len(names) if stacked else 3.1), layout="constrained")
    if stacked:
        grid = figure.subplots(len(names), 1, sharey=True, squeeze=False)[:, 0]
    else:
        grid = figure.subplots(1, len(names), sharey=True, squeeze=False, width_ratios=weights)[0]
    for axes, name, weight in zip(grid, names, weights, strict=True):
        share = 1.0 if stacked else weight / sum(weights)
        _error_panel(axes, panels[name], points=0.9 * 72 * _WIDTH * share)
        axes.set_title(name)
        if axes is grid[0] or stacked:
            axes.set_ylabel("relative error (%)")
        if axes is grid[-1] or not stacked:
            axes.set_xlabel("layer")
    grid[0].set_ylim(bottom=0)
    return figure


def sizes(compression: Row) -> Figure:
    """Numbers and bytes on disk, all adapters against the one bundle."""
    figure = Figure(figsize=(_WIDTH, 1.7), layout="constrained")
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("parameters", "parameters", lambda value: f"{value:,.0f}"),
        ("bytes", "bytes on disk", size),
    )
    for axes, (key, label, words) in zip(figure.subplots(1, 2), shown, strict=True):
        before, after = compression[f"{key}_before"], compression[f"{key}_after"]
        drawn = axes.barh([0, 1], [before, after], color=[PERSONAL, COMPRESSED], height=0.6)
        axes.bar_label(drawn, [words(before), words(after)], padding=4)
        axes.set_yticks([0, 1], ["all adapters", "bundle"])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(before, after, 1))
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.set_title(f"{label}, {ratio(before, after)} fewer")
        axes.spines["bottom"].set_visible(False)
    return figure


def stage_times(stages: Sequence[Row]) -> Figure:
    """Wall time of every stage, first at the top."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * len(stages)), layout="constrained")
    axes = figure.subplots()
    seconds = [stage["seconds"] for stage in stages]
    rows = list(range(len(stages)))
    drawn = axes.barh(rows, seconds, color=PERSONAL, height=0.6)
    words = [
        duration(stage["seconds"]) + (f", {stage['attempts']} attempts" if stage["attempts"] > 1 else "")
        for stage in stages
    ]
    axes.bar_label(drawn, words, padding=4)
    axes.set_yticks(rows, [_label(stage["name"]) for stage in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(*seconds, 1e-3))
    axes.set_xlabel("wall time (s)")
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    return figure


def _bars(axes: Axes, series: Mapping[str, Sequence[float]]) -> None:
    colours = {"base": BASE, "personal": PERSONAL, "compressed": COMPRESSED}
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        left = [index - 0.4 + number * width for index in range(len(values))]
        axes.bar(left, values, width=0.92 * width, align="edge", color=colours[name], label=name)


def _name_users(axes: Axes, ids: Sequence[str]) -> None:
    axes.tick_params(axis="x", length=0)
    names = [_label(one) for one in ids]
    crowded = sum(len(name) + 2 for name in names) > 100
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(names)), names, **turned)


def _quantiles(axes: Axes, series: Mapping[str, Sequence[float]]) -> None:
    """Each way's losses, sorted on their own: the share of users at or below a loss."""
    for (name, values), colour in zip(series.items(), (BASE, PERSONAL, COMPRESSED), strict=True):
        known = sorted(value for value in values if math.isfinite(value))
        shares = [100 * (index + 0.5) / len(known) for index in range(len(known))]
        dashes = (0, (4, 2)) if name == "compressed" else "-"
        axes.plot(shares, known, color=colour, linewidth=2, linestyle=dashes, label=name)
    axes.set_xlabel("share of users with at most this loss (%)")
    axes.set_xlim(0, 100)


def _sorted_gains(axes: Axes, personal: Sequence[float], compressed: Sequence[float]) -> None:
    pairs = sorted(
        (pair for pair in zip(personal, compressed, strict=True) if all(map(math.isfinite, pair))),
        reverse=True,
    )
    ranks = range(1, len(pairs) + 1)
    axes.plot(ranks, [pair[1] for pair in pairs], ".", color=COMPRESSED, markersize=3.5)
    axes.plot(ranks, [pair[0] for pair in pairs], color=PERSONAL, linewidth=2)
    axes.set_xlim(0, len(pairs) + 1)
    axes.set_xlabel("users, by the gain of their personal adapter")


def _place(module: str) -> tuple[str, str, int]:
    """Panel, kind of module within a layer, and layer (-1 without one) of a full module name."""
    leaf, (_, layer, kind) = module.rsplit(".", 1)[-1], split_layer(module) or ("", -1, module)
    if leaf in ("q_proj", "v_proj"):
        return leaf, leaf, layer
    return "the rest", kind.removeprefix("."), layer


def _error_panel(axes: Axes, kinds: Mapping[str, Mapping[int, Sequence[float]]], *, points: float) -> None:
    """One panel, `points` wide."""
    layers = sorted({layer for values in kinds.values() for layer in values})
    step = 0.8 / len(kinds)
    for number, (kind, values) in enumerate(sorted(kinds.items())):
        colour = _REST[number % len(_REST)]
        axes.bar([0], [0], color=colour, label=_label(kind, limit=24))
        for layer, shares in values.items():
            if shares:
                percents = [100 * share for share in shares]
                span = (layers.index(layer) - 0.4 + number * step, 0.92 * step)
                axes.bar([span[0]], [_mean(percents)], span[1], align="edge", color=colour, alpha=0.55)
                _users_on_bar(axes, percents, span=span, points=points / len(layers) * span[1])
    axes.tick_params(axis="x", length=0)
    every = 4 if len(layers) > 16 else 1
    named = [str(layer) if layer >= 0 else "none" for layer in layers]
    axes.set_xticks(range(0, len(layers), every), named[::every])
    axes.margins(x=0.02)
    if len(kinds) > 1:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "borderaxespad": 0.2}
        axes.legend(ncols=4, fontsize=8, **place)


def _users_on_bar(axes: Axes, values: Sequence[float], *, span: tuple[float, float], points: float) -> None:
    """One dot a user, or for many users a line from least to largest error, thick over the middle 80 %.

    Args:
        span: left end and width of the bar, in data units.
        points: width of the bar, which bounds what is drawn on it.
    """
    left, width = span
    if len(values) <= FEW:
        places = [left + width * (index + 1) / (len(values) + 1) for index in range(len(values))]
        axes.plot(places, values, "o", color=INK, markersize=min(2.4, 0.4 * points), markeredgewidth=0)
        return
    ordered, middle = sorted(values), left + width / 2
    tenth = len(ordered) // 10
    thick = min(2.4, 0.4 * points)
    axes.plot([middle] * 2, [ordered[0], ordered[-1]], color=INK, linewidth=thick / 3)
    axes.plot([middle] * 2, [ordered[tenth], ordered[-1 - tenth]], color=INK, linewidth=thick)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _label(text: str, *, limit: int = _LABEL) -> str:
    shown = printable(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
