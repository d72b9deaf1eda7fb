"""The plot of docs/personal.md: what is won over shared against the numbers of a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.personal_front import by_corpus, front

_COLOURS = {
    "core": "#0072b2",
    "core beside shared": "#56b4e9",
    "learnt basis": "#009e73",
    "federated basis": "#cc79a7",
    "LoRA": "#e69f01",
    "full LoRA": "#a63d00",
}
_OTHERS = "#8c959e"
USUAL = 24  # users a basis is of where nothing is said
Row = Mapping[str, Any]


def plot(rows: Sequence[Row]) -> Path:
    """Gain over shared against numbers a user, a panel a corpus; bars are intervals over users."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from benchmarks.compression_page import save_plot

    panels = by_corpus([row for row in rows if row["numbers"] and row["basis_users"] in (0, USUAL)])
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for axis, (corpus, own) in zip(axes[0], panels, strict=True):
        _panel(axis, own)
        axis.set(xscale="log", title=corpus, xlabel="numbers a user", ylabel="won over shared, nats a token")
        axis.axhline(0, color=_OTHERS, linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=2)
    return save_plot(figure, "personal-front")


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    for kind, some in _kinds(rows).items():
        some = sorted(some, key=lambda row: row["numbers"])
        x, y = [row["numbers"] for row in some], [row["gain"] for row in some]
        ends = [
            [row["gain"] - row["interval"][0] for row in some],
            [row["interval"][1] - row["gain"] for row in some],
        ]
        colour = _COLOURS.get(kind.partition(" +")[0], _OTHERS)
        style = {
            "core": "o-",
            "learnt basis": "o-",
            "federated basis": "o-",
            "core + own": "s--",
            "LoRA": "D-",
        }.get(kind, "o" if kind in _COLOURS else "x")
        axis.errorbar(x, y, yerr=ends, fmt=style, color=colour, elinewidth=0.6, alpha=0.9, label=kind)
    ordered = sorted(rows, key=lambda row: row["numbers"])
    best = [ordered[n] for n in front([(row["numbers"], row["gain"]) for row in ordered])]
    axis.step(
        [row["numbers"] for row in best],
        [row["gain"] for row in best],
        where="post",
        color="#444444",
        lw=0.7,
        label="front",
    )


def _kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        ours = row["arm"].startswith("core") and row["own"]
        found.setdefault(f"{row['arm']} + own" if ours else row["arm"], []).append(row)
    return found
