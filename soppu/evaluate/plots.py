"""The report's figures, as SVG text to be put into the page.

Drawn on matplotlib Figure objects; pyplot is not used. Style settings hold only while a figure is drawn, but
matplotlib keeps them in one place, so two threads should not draw at once. The same report gives the same
bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from statistics import fmean
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soppu.evaluate.wording import duration, patience, ratio, shortened, size, who
from soppu.module_names import split_layer

FEW = 24
"""Up to this many users are drawn one by one, more as distributions."""

# Blue, orange and grey of Okabe and Ito, and a plum: apart for common colour blindness, and in brightness.
INK, MUTED, LINE = "#1f2329", "#59636f", "#d1d9e1"
BASE, SHARED, PERSONAL, COMPRESSED = "#8c959e", "#7a1f5c", "#0072b2", "#e69f01"
_REST = (PERSONAL, COMPRESSED, "#009e73", "#cc79a7", "#d55e00", "#56b4e9", BASE)
_WAYS = {"base": BASE, "shared": SHARED, "personal": PERSONAL, "compressed": COMPRESSED}
# The page sets these variables, once for light and once for dark.
_THEME = {INK: "ink", MUTED: "muted", LINE: "line"} | {colour: name for name, colour in _WAYS.items()}
_WIDTH = 9.0  # inches; the page scales it
_BARS = 40  # modules above which the panels of errors stand below each other
_LABEL = 16  # characters of a name beside a bar
_FONT = "DejaVu Sans"  # comes with matplotlib; what texts are measured with
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "font.family": [_FONT],
    "font.size": 9,
    "text.parse_math": False,  # names come from outside
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
}

Row = Mapping[str, Any]
FloatArray = npt.NDArray[np.float64]


def figures(report: Row) -> dict[str, str]:
    """Every figure the report has data for: name -> SVG text."""
    users = [user for user in report["users"] if user["loss_base"] is not None]
    made, rounds = report["compression"], report["federation"]
    drawings: tuple[tuple[str, str, Callable[[Any], Figure], Any], ...] = (
        ("losses", "Held-out loss and gain of every user", losses, users),
        ("over_shared", "Gain over the shared adapter of every user", over_shared, _with_shared(users)),
        (
            "rounds",
            "Losses over the rounds",
            round_losses,
            rounds if rounds and rounds["rounds_log"] else None,
        ),
        ("errors", "Relative reconstruction error by layer", errors, made["by_module"]),
        ("sizes", "Parameters and bytes before and after", sizes, made),
        ("stages", "Seconds a stage took", stage_times, report["stages"]),
    )
    return {
        name: draw(partial(figure, data), name=name, label=label)
        for name, label, figure, data in drawings
        if data
    }


def draw(figure: Callable[[], Figure], *, name: str, label: str) -> str:
    """SVG text of a figure: ids begin with `name`, colours are the page's variables, no metadata."""
    out = StringIO()
    style = matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}])
    with style, warnings.catch_warnings():
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
    """Losses above, gains over the base model below: bars for few users, sorted curves for many."""
    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    names = [name for name in _WAYS if any(user[f"loss_{name}"] is not None for user in users)]
    ways = {name: np.array([user[f"loss_{name}"] for user in users], dtype=float) for name in names}
    gains = {name: ways["base"] - ways[name] for name in names[1:]}
    if len(users) <= FEW:
        _bars(above, ways)
        _bars(below, gains)
        _name_users(above, [])
        _name_users(below, [who(user["id"]) for user in users])
    else:
        _quantiles(above, ways)
        _sorted_gains(below, gains["personal"], gains["compressed"])
    above.set_title("Held-out loss (lower is better)")
    above.set_ylabel("nats a token")
    below.set_title("Gain over the base model (higher is better)")
    below.set_ylabel("nats a token")
    below.axhline(0, color=MUTED, linewidth=0.8)
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names))
    return figure


def over_shared(users: Sequence[Row]) -> Figure:
    """Gain of what is served over the shared adapter: a dot and its interval each, or a histogram of many."""
    figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    told = [user["gain_over_shared"] for user in users]
    means = [one["mean"] for one in told]
    if len(users) <= FEW:
        for place, one in enumerate(told):
            if one["low"] is not None:
                axes.plot([place] * 2, [one["low"], one["high"]], color=MUTED, linewidth=1.4)
        axes.plot(range(len(means)), means, "o", color=COMPRESSED, markersize=5)
        axes.axhline(0, color=SHARED, linewidth=1)
        _name_users(axes, [who(user["id"]) for user in users])
        axes.set_ylabel("nats a token")
    else:
        axes.hist(means, bins=30, color=COMPRESSED)
        axes.axvline(0, color=SHARED, linewidth=1)
        axes.set_xlabel("nats a token")
        axes.set_ylabel("users")
    axes.set_title("Gain of what is served over the shared adapter (higher is better)")
    return figure


def round_losses(federation: Row) -> Figure:
    """The losses that decide when shared rounds are over, by how many rounds the adapter has had."""
    figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    log = federation["rounds_log"]
    shared = [one for one in log if one["mode"] == "shared"]
    # a round's validation loss is of the adapter that was sent: of the round before
    series = (
        (
            "validation text, shared adapter",
            PERSONAL,
            [(one["round"] - 1, one["shared_loss"]) for one in log],
        ),
        ("public text, shared adapter", SHARED, [(one["round"], one["public_loss"]) for one in shared]),
    )
    for name, colour, points in series:
        known = [(place, loss) for place, loss in points if loss is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=4, label=name)
    marked = (
        ("basis", "s", SHARED, "validation text, a new core in the basis that is learnt"),
        ("personal", "D", COMPRESSED, "validation text, as trained in the personal round"),
    )
    for mode, marker, colour, label in marked:
        own = [one for one in log if one["mode"] == mode and one["emulator_loss"] is not None]
        places, losses = [one["round"] for one in own], [one["emulator_loss"] for one in own]
        if own:
            axes.plot(places, losses, marker, color=colour, markersize=4, label=label)
    if shared:
        axes.axvline(shared[-1]["round"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)))
    axes.set_title(f"Losses over the rounds: {patience(federation)}")
    axes.set_xlabel("rounds that the adapter has had")
    axes.set_xticks(range(0, 1 + max(one["round"] for one in log), 1 + len(log) // 20))
    axes.set_ylabel("nats a token")
    axes.legend(fontsize=8)
    return figure


def _with_shared(users: Sequence[Row]) -> list[Row]:
    return [user for user in users if user["gain_over_shared"] is not None]


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
    shape = {"nrows": len(names)} if stacked else {"ncols": len(names), "width_ratios": weights}
    grid = figure.subplots(**shape, sharey=True, squeeze=False).ravel()
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
        bars = [("all adapters", before, words(before)), ("bundle", after, words(after))]
        _lying_bars(axes, bars, colours=[PERSONAL, COMPRESSED])
        axes.set_xlim(0, 1.35 * max(before, after, 1))
        axes.set_xticks([])
        axes.set_title(f"{label}, {ratio(before, after)} fewer")
        axes.spines["bottom"].set_visible(False)
    return figure


def stage_times(stages: Sequence[Row]) -> Figure:
    """Wall time of every stage, first at the top."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * len(stages)), layout="constrained")
    axes = figure.subplots()
    bars = []
    for stage in stages:
        retried = f", {stage['attempts']} attempts" if stage["attempts"] > 1 else ""
        bars.append((stage["name"], stage["seconds"], duration(stage["seconds"]) + retried))
    _lying_bars(axes, bars, colours=[PERSONAL])
    axes.set_xlim(0, 1.25 * max(*(stage["seconds"] for stage in stages), 1e-3))
    axes.set_xlabel("wall time (s)")
    axes.grid(visible=True, axis="x")
    return figure


def _lying_bars(axes: Axes, bars: Sequence[tuple[str, float, str]], *, colours: Sequence[str]) -> None:
    """Bars from the top down: a name before each, words behind it."""
    names, lengths, words = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), lengths, color=colours, height=0.6)
    axes.bar_label(drawn, words, padding=4)
    axes.set_yticks(range(len(bars)), [shortened(name, limit=_LABEL) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False)


def _bars(axes: Axes, series: Mapping[str, FloatArray]) -> None:
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        left = np.arange(len(values)) - 0.4 + number * width
        axes.bar(left, values, width=0.92 * width, align="edge", color=_WAYS[name], label=name)


def _name_users(axes: Axes, ids: Sequence[str]) -> None:
    axes.tick_params(axis="x", length=0)
    names = [shortened(one, limit=_LABEL) for one in ids]
    crowded = sum(len(name) + 2 for name in names) > 100
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(names)), names, **turned)


def _quantiles(axes: Axes, series: Mapping[str, FloatArray]) -> None:
    """Each way's losses, sorted on their own: the share of users at or below a loss."""
    for name, values in series.items():
        known = np.sort(values[np.isfinite(values)])
        shares = 100 * (np.arange(len(known)) + 0.5) / len(known)
        dashes = (0, (4, 2)) if name == "compressed" else "-"
        axes.plot(shares, known, color=_WAYS[name], linewidth=2, linestyle=dashes, label=name)
    axes.set_xlabel("share of users with at most this loss (%)")
    axes.set_xlim(0, 100)


def _sorted_gains(axes: Axes, personal: FloatArray, compressed: FloatArray) -> None:
    known = np.isfinite(personal) & np.isfinite(compressed)
    order = np.lexsort((compressed[known], personal[known]))[::-1]
    ranks = range(1, len(order) + 1)
    axes.plot(ranks, compressed[known][order], ".", color=COMPRESSED, markersize=3.5)
    axes.plot(ranks, personal[known][order], color=PERSONAL, linewidth=2)
    axes.set_xlim(0, len(order) + 1)
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
        axes.bar([0], [0], color=colour, label=shortened(kind, limit=24))
        for layer, shares in values.items():
            if shares:
                percents = [100 * share for share in shares]
                span = (layers.index(layer) - 0.4 + number * step, 0.92 * step)
                axes.bar([span[0]], [fmean(percents)], span[1], align="edge", color=colour, alpha=0.55)
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
