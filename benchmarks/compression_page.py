"""The tables and plots of docs/compression.md, written from the result files between the page's marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT
from soppu.files import write_bytes

PAGE = ROOT / "docs" / "compression.md"
IMAGES = ROOT / "docs" / "images"
_COLOURS = {
    "residual": "#0072b2",
    "svd": "#e69f01",
    "joint": "#00694b",
    "joint-diag": "#8c959e",
    "cluster": "#56b4e9",
    "ternary": "#a63d00",
    "lorashare": "#cc79a7",
    "vlora": "#444444",
}
# What may stand between marks of a page; a block without a result file stays as it is.
MARKS = (
    "gpt2",
    "synthetic-100",
    "synthetic-500",
    "synthetic-2000",
    "gain",
    "readme-compression",
    "ternary",
    "cold-start",
    "streaming",
    "joint-speed",
)
_NAMES = {"gpt2": "three real GPT-2 adapters", "synthetic-100": "100 synthetic adapters"}


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there."""
    made: dict[str, str] = {}
    compression = read_result("compression")
    for section, found in compression.items():
        made[section] = error_table(found)
    if gain := read_result("gain"):
        made["gain"] = gain_table(gain)
        made["readme-compression"] = readme_block(compression["gpt2"], gain)
    makers = {
        "ternary": ternary_table,
        "cold_start": cold_table,
        "streaming": stream_table,
        "joint_speed": speed_table,
    }
    for name, make in makers.items():
        if found := read_result(name):
            where = found["coder"]["circumstances"] if name == "ternary" else found
            made[name.replace("_", "-")] = f"{make(found)}\n\n{circumstances_line(where)}"
    return made


def cold_table(found: Mapping[str, Any]) -> str:
    """Milliseconds from disk to ready, for one user and for many."""
    rows = [
        [n, form, f"{row['bytes']:,}", f"{1e3 * row['seconds']:.1f}", f"{row['times_faster']:.1f}x"]
        for n, forms in found["users"].items()
        for form, row in forms.items()
    ]
    return markdown(["users", "form", "bytes", "ms", "faster than uncompressed"], rows)


def stream_table(found: Mapping[str, Any]) -> str:
    """Peak memory by method and number of users."""
    rows = [
        [row["method"], str(row["n"]), f"{row['bytes_read_once'] / 1e6:,.0f} MB"]
        + [f"{row['peak_bytes'] / 1e6:,.0f} MB", f"{row['seconds']:.0f}"]
        for row in found["rows"]
    ]
    return markdown(["method", "users", "on disk", "peak memory", "seconds"], rows)


def speed_table(found: Mapping[str, Any]) -> str:
    """Seconds of a joint fit, and how many times faster an adapter's iteration is than the dense one."""
    ours, ratios, users = found["ours"], found["ratios"], found["setting"]["n"]
    hundred = ratios["dense_100_iterations_over_ours"] * ours["seconds"]
    rows = [
        ["dense, an adapter's iteration", f"{found['dense']['seconds']:.3f} s", "1"],
        [
            "factored, an adapter's iteration",
            f"{1e6 * found['factored']['seconds'] / users:.0f} us",
            f"{ratios['dense_over_factored_an_iteration']:,.0f}",
        ],
        [
            "ours, an adapter's iteration once ranges have grown",
            f"{1e6 * ours['alternation_seconds'] / users:.0f} us",
            f"{ratios['dense_over_an_alternation_of_ours']:,.0f}",
        ],
        [
            "ours, the whole fit (100 dense iterations of all adapters against it)",
            f"{ours['seconds']:.2f} s",
            f"{ratios['dense_100_iterations_over_ours']:,.0f}",
        ],
        [
            "`compress --method joint`, from adapters in memory to the bundle",
            f"{found['compress']['seconds']:.2f} s",
            f"{hundred / found['compress']['seconds']:,.0f}",
        ],
    ]
    return markdown(["what", "time", "times faster"], rows)


def ternary_table(found: Mapping[str, Any]) -> str:
    """Bits a value and speed of the bit stream on one core, beside zstd -3."""
    rows = []
    for row in found["coder"]["rows"]:
        cells = [f"{100 * row['density']:g} %", f"{row['entropy_bits']:.4f}", f"{row['golomb']['bits']:.4f}"]
        cells += [f"{100 * row['above_entropy']:.2f} %", f"{row['published_bits']:.4f}"]
        for coder in ("golomb", "zstd_3"):
            made = row[coder]
            speeds = [made[f"{way}_values_per_second"] / 1e6 for way in ("encode", "decode")]
            cells.append(f"{speeds[0]:,.0f} / {speeds[1]:,.0f}")
        rows.append([*cells, f"{row['zstd_3']['bits']:.4f}"])
    head = ["density", "entropy", "bits", "above", "published", "M values/s in / out", "zstd -3", "its bits"]
    return markdown(head, rows)


def readme_block(found: Mapping[str, Any], gain: Mapping[str, Any]) -> str:
    """What the README says of compression: one table and one sentence."""
    kept = [row for row in gain["rows"] if row["method"] == "residual" and row["mean_gain_kept"] >= 0.99]
    best = max(kept, key=lambda row: row["ratio"])
    return (
        "Relative error at equal bytes on disk, three real GPT-2 adapters (against 16 bits a number):\n\n"
        + error_table(found)
        + f"\n\nOf {gain['users']} personal adapters trained by this pipeline the default keeps"
        f" {100 * best['mean_gain_kept']:.1f} % of the held-out gain at {best['ratio']:.0f}x fewer bytes,"
        f" the worst user {100 * best['worst_gain_kept']:.1f} %."
    )


def error_table(found: Mapping[str, Any]) -> str:
    """Relative error by method and ratio; the best of a row in bold."""
    ratios = sorted({row["wanted"] for row in found["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    cells = {(row["method"], row["wanted"]): row["error"] for row in found["rows"]}
    for package, points in found.get("packages", {}).items():
        methods.append(package)
        for wanted in ratios:
            allowed = next(row["allowed"] for row in found["rows"] if row["wanted"] == wanted)
            fits = [point["overall"] for point in points if point["bytes"] <= allowed]
            cells[package, wanted] = min(fits, default=None)
    head = ["ratio", *methods]
    rows = [[f"{wanted:g}x", *_bold([cells.get((m, wanted)) for m in methods])] for wanted in ratios]
    return markdown(head, rows) + f"\n\n{circumstances_line(found)}"


def gain_table(found: Mapping[str, Any]) -> str:
    """Mean gain kept, and the worst user's, by method and ratio."""
    ratios = sorted({_nearest(row["ratio"]) for row in found["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    cells = {(row["method"], _nearest(row["ratio"])): row for row in found["rows"]}
    rows = []
    for wanted in ratios:
        held = [cells.get((method, wanted)) for method in methods]
        rows.append(
            [f"{wanted:g}x"]
            + [
                f"{100 * r['mean_gain_kept']:.1f} / {100 * r['worst_gain_kept']:.1f}" if r else ""
                for r in held
            ]
        )
    return markdown(["ratio", *methods], rows) + f"\n\n{circumstances_line(found)}"


def _nearest(value: float) -> float:
    return min((4, 8, 16, 24, 32, 48, 64, 96, 128), key=lambda wanted: abs(wanted / value - 1))


def _bold(values: Sequence[float | None]) -> list[str]:
    there = [value for value in values if value is not None]
    best = min(there, default=None)
    return ["" if v is None else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]


def plot_errors(section: str, found: Mapping[str, Any]) -> Path:
    """Relative error over ratio, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    parameters = next(row["allowed"] * row["wanted"] / 2 for row in found["rows"])
    for method in dict.fromkeys(row["method"] for row in found["rows"]):
        rows = [r for r in found["rows"] if r["method"] == method and r["error"] is not None]
        axes.plot(
            [r["ratio"] for r in rows], [r["error"] for r in rows], "o-", label=method, color=_COLOURS[method]
        )
    for package, points in found.get("packages", {}).items():
        x, y = [2 * parameters / p["bytes"] for p in points], [p["overall"] for p in points]
        axes.plot(x, y, "x:", label=package, color=_COLOURS[package], alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="times smaller than 16 bits a number, all bytes counted")
    axes.set_ylabel("relative error, rms over users")
    axes.set_title(_NAMES.get(section, f"{found['n']} synthetic adapters"))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    return save_plot(figure, f"compression-{section}")


def plot_gain(found: Mapping[str, Any]) -> Path:
    """Mean gain kept over ratio; dotted: the worst user."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in found["rows"]):
        rows = sorted((r for r in found["rows"] if r["method"] == method), key=lambda r: r["ratio"])
        x = [r["ratio"] for r in rows]
        axes.plot(x, [100 * r["mean_gain_kept"] for r in rows], "o-", label=method, color=_COLOURS[method])
        axes.plot(x, [100 * r["worst_gain_kept"] for r in rows], ":", color=_COLOURS[method], alpha=0.7)
    axes.axhline(99, color="#8c959e", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="times smaller than 16 bits a number", ylabel="gain kept, %", ylim=(40, 102)
    )
    axes.set_title(f"{found['users']} personal adapters: mean (lines) and worst user (dotted)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    return save_plot(figure, "compression-gain")


def save_plot(figure: Any, name: str) -> Path:
    """Write docs/images/<name>.png and close the figure."""
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    path = IMAGES / f"{name}.png"
    write_bytes(path, buffer.getvalue())
    return path


def write_page() -> Path:
    """Draw the plots, fill the page."""
    for section, found in read_result("compression").items():
        plot_errors(section, found)
    if gain := read_result("gain"):
        plot_gain(gain)
    made = blocks()
    fill(made, PAGE, ROOT / "README.md")
    return PAGE
