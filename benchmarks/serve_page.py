"""Tables and plots of serving, from the result files to between the marks of README.md and docs/serving.md.

python -m benchmarks.serve_page
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compression_page import save_plot
from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT
from benchmarks.serve import FIRST, kind_of

PAGES = (ROOT / "README.md", ROOT / "docs" / "serving.md")
MARKS = (
    "readme-serve",
    "readme-soak",
    "readme-container",
    "serve",
    "serve-latency",
    "serve-engine",
    "serve-prefix",
    "serve-equality",
    "serve-soak",
    "serve-soak-mixed",
    "serve-kernels",
    "serve-methods",
    "serve-own",
)
_COLOURS = {
    "base": "#8c959e",
    "soppu": "#0072b2",
    "stock": "#e69f01",
    "stock-default": "#a63d00",
    "embedded-base": "#b8d8c8",
    "embedded": "#00694b",
}
_NAMES = {
    "base": "vLLM, LoRA off",
    "soppu": "vLLM with the plugin",
    "stock": "vLLM LoRA, at its best",
    "stock-default": "vLLM LoRA, as it comes",
    "embedded-base": "embedded server, its base",
    "embedded": "embedded server, bundle",
}
_KERNEL_USERS = 1000


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    made: dict[str, str] = {}
    if found := read_result("serve"):
        if others := [row for row in found["rows"] if kind_of(row) != FIRST]:
            made["serve-methods"] = "\n\n".join([_methods(others), *_gain_kept(), *_studied(others)])
        found["rows"] = [row for row in found["rows"] if kind_of(row) == FIRST]
        line = circumstances_line(found)
        made["readme-serve"] = "\n\n".join([_largest(found), _bytes(found), line, *_studied(others)])
        made["serve"] = f"{_throughput(found)}\n\n{_bytes(found)}\n\n{line}"
        made["serve-latency"] = _latency(found)
    if found := read_result("engine"):
        made["serve-engine"] = f"{_engine(found)}\n\n{circumstances_line(found)}"
    if found := read_result("prefix"):
        made["serve-prefix"] = f"{_prefix(found)}\n\n{circumstances_line(found)}"
    if found := read_result("serve_equality"):
        made["serve-equality"] = f"{_equality(found)}\n\n{circumstances_line(found)}"
    if found := read_result("soak"):
        made["serve-soak"] = f"{_soak(found)}\n\n{circumstances_line(found)}"
        made["readme-soak"] = _soak_line(found)
    if found := read_result("soak_mixed"):
        made["serve-soak-mixed"] = f"{_soak(found)}\n\n{_kill(found)} {circumstances_line(found)}"
    if found := read_result("container"):
        made["readme-container"] = f"{_container(found)}\n\n{circumstances_line(found)}"
    if found := read_result("serve_kernels"):
        made |= _layers(found)
    return made


def _layers(found: Mapping[str, Any]) -> dict[str, str]:
    """The tables of one layer, by device: with a basis that is shared, and with numbers of users' own."""
    made = {"serve-kernels": "\n\n".join(_kernels(found[device], "shared") for device in sorted(found))}
    own = [name for name in sorted(found) if any(row.get("kind") == "own" for row in found[name]["rows"])]
    return made | ({"serve-own": "\n\n".join(_kernels(found[name], "own") for name in own)} if own else {})


def _methods(rows: Sequence[Mapping[str, Any]]) -> str:
    """Share of the base's throughput by shape and method, the error beside it."""
    lines = []
    for row in rows:
        error, share = row["relative_error"], row["to_base"]
        cells = [row["shape"], row["method"], f"{row['users']:,}", f"{error['median']:.2f}" if error else ""]
        of_base = [f"{100 * share[name]:.0f} %" if name in share else "" for name in ("soppu", "stock")]
        own = share["embedded"] / share["embedded-base"] if "embedded-base" in share else None
        lines.append([*cells, *of_base, "" if own is None else f"{100 * own:.0f} %", row["commit"][:12]])
    head = [
        "shape",
        "method",
        "users",
        "relative error, median",
        "vLLM with the plugin",
        "vLLM LoRA, at its best",
    ]
    return markdown([*head, "embedded, of its own base", "commit"], lines)


def _gain_kept() -> list[str]:
    """What the demo's users, whose adapters are of the pipeline's shape, keep in a bundle of that method."""
    if not (found := read_result("demo")):
        return []
    told, kept, users = found["compression"], found["gate"]["mean_gain_kept"], len(found["users"])
    return [
        f"Adapters that were trained have more in common: in the demo's {told['method']} bundle, of the"
        f" pipeline's shape, {users} users have a relative error of {told['relative_error']['mean']:.2f} on"
        f" the mean, and keep {100 * kept:.1f} % of their gain (`benchmarks/results/demo.json`)."
    ]


def _studied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Speed and quality of the same users: those of the study, in the form that keeps the gain."""
    told = []
    for row in (one for one in rows if one.get("quality")):
        of, cores, pairs = row["quality"], *(row["adapter_bytes"][name] / 1e6 for name in ("cores", "pairs"))
        low, high = of["interval"]
        told.append(
            f"Speed and quality of the same users: {row['users']:,} with the numbers of the {of['users']} of"
            f" the study whom no part had seen, **{of['arm']}** in the last four layers ({cores:.0f} MB at 16"
            f" bits, as LoRAs {pairs:.0f} MB). vLLM with the plugin makes"
            f" **{100 * row['to_base']['soppu']:.0f} %** of the base model's tokens a second, and they win"
            f" {of['gain']:+.3f} nats a token over shared ({low:+.3f} to {high:+.3f}),"
            f" {100 * of['kept']:.0f} % of what a full LoRA wins; stored in {of['bits']} bits their loss is"
            f" {of['mean_stored']:.4f}, as trained {of['mean']:.4f} (commit `{row['commit'][:12]}`)."
        )
    return told


def _container(found: Mapping[str, Any]) -> str:
    """Size, seconds of a publication, and what killing left."""
    push = {form: f"{told['push_s'] + told['canaries_s']:.1f} s" for form, told in found["push_s"].items()}
    kills, half, size = len(found["kills"]), found["half_published"], round(found["image_mb"])
    asked, errors = f"{found['schemathesis_requests']:,}", found["server_errors"]
    return (
        f"The image has {size} MB, most of it torch. {found['users']} users of a small random"
        f" model are published to a container that runs in {push['adapters']} as adapters and in"
        f" {push['bundle']} as a bundle, every user tried. Of {kills} publications that SIGKILL ended, of the"
        f" publisher or of the container, {half} left somebody answered from another version than the one"
        f" live. Of {asked} requests that schemathesis made up, {errors} were answered with 500 or more."
    )


def _largest(found: Mapping[str, Any]) -> str:
    """The turn with the most users, uniform traffic."""
    row = found["rows"][0]
    lines = [
        [
            _NAMES[name],
            f"{value:.0f}",
            f"{100 * row['to_base'][name]:.0f} %",
            f"{row['memory'][name] / 1e9:.2f} GB",
        ]
        for name, value in row["tokens_per_second"].items()
    ]
    return markdown([f"{row['users']:,} users, uniform", "tokens a second", "of base", "memory"], lines)


def _throughput(found: Mapping[str, Any]) -> str:
    """Tokens a second and share of the base's in the same turn, every turn."""
    names = list(found["rows"][0]["tokens_per_second"])
    lines = []
    for row in sorted(found["rows"], key=lambda row: (row["users"], row["zipf"])):
        cells = [f"{row['users']:,}", "Zipf" if row["zipf"] else "uniform"]
        for name in names:
            speed = row["tokens_per_second"].get(name)
            cells.append("" if speed is None else f"{speed:.0f} ({100 * row['to_base'][name]:.0f} %)")
        lines.append(cells)
    return markdown(["users", "traffic", *(_NAMES[name] for name in names)], lines)


def _latency(found: Mapping[str, Any]) -> str:
    """Of the turn with the most users: milliseconds, medians over its repeats."""
    lines = []
    for name, runs in found["rows"][0]["runs"].items():
        cells = [_NAMES[name]]
        for what in ("first_token_ms", "between_tokens_ms"):
            cells += [f"{sorted(run[what][p] for run in runs)[len(runs) // 2]:.0f}" for p in ("p50", "p99")]
        lines.append(cells)
    head = ["ms", "first token, p50", "p99", "between tokens, p50", "p99"]
    return markdown(head, lines)


def _bytes(found: Mapping[str, Any]) -> str:
    size, slots = found["adapter_bytes"], found["adapters"]["slots"]
    cores, basis = f"{size['cores'] / 1e6:.1f} MB", f"{size['basis'] / 1e6:.1f} MB"
    users, share = f"{found['rows'][0]['users']:,}", f"{100 * size['cores'] / size['pairs']:.2f} %"
    return (
        f"The cores of {users} users take {cores} ({share} of their adapters at 16 bits), their one basis"
        f" {basis}; vLLM's own LoRA keeps {slots} adapters resident, which is as many bytes."
    )


def _engine(found: Mapping[str, Any]) -> str:
    """The embedded engine in its own process: its base, and users of a bundle."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        for kind, share in (("base", 1.0), ("users", found[dtype]["users_of_base_tokens_per_second"])):
            one = found[dtype][kind]
            cells = [f"{one['tokens_per_second']:.0f}", f"{100 * share:.0f} %"]
            keys = ("first_token_seconds", "gap_p50_seconds", "gap_p99_seconds")
            cells += [f"{1e3 * one[key]:.0f}" for key in keys]
            lines.append([dtype, kind, *cells])
    head = ["type", "who asks", "tokens a second", "of base", "ms to first token"]
    return markdown([*head, "ms between tokens, p50", "p99"], lines)


def _prefix(found: Mapping[str, Any]) -> str:
    """First tokens with and without shared prompts; the memory of one long request and fifteen short."""
    lines = []
    for name, one in (("another user has asked", found), ("the user has asked before", found["again"])):
        with_, without = (1e3 * one["ttft_seconds"][way] for way in ("with", "without"))
        cells = [f"{without:,.0f}", f"{with_:,.0f}", f"{one['ttft_ratio']:.1f}x"]
        lines.append([name, *cells, str(one["texts"])])
    head = ["the same 512 tokens", "ms to first token, not shared", "shared", "ratio", "requests"]
    rows = found["memory"]["one long and fifteen short"]
    keys = ("bytes_needed", "bytes_grown", "bytes_after", "bytes_kept_for_later")
    memory = [[name, *(f"{row[key] / 1e6:,.1f}" for key in keys)] for name, row in rows.items()]
    equal = "All texts are equal." if found["texts_equal"] else "TEXTS DIFFER."
    columns = ["MB", "needed by tokens", "grown by", "left afterwards", "of it prompts kept"]
    return f"{markdown(head, lines)}\n\n{equal}\n\n{markdown(columns, memory)}"


def _equality(found: Mapping[str, Any]) -> str:
    lines = []
    for dtype in ("float32", "bfloat16"):
        one = found[dtype]
        cells = [f"{one[name]['same']} of {one['texts']}" for name in ("vllm plugin", "embedded")]
        lines.append([dtype, str(one["texts"]), str(one["different"]), *cells])
    return markdown(["type", "texts", "of them different", "vLLM plugin", "embedded"], lines)


def _soak(found: Mapping[str, Any]) -> str:
    lines = []
    for name, client in (("vllm", "openai"), ("embedded", "lorax-client")):
        one = found[name]
        cells = [str(one[key]) for key in ("swaps", "failed", "wrong_user", "wrong_version")]
        growth = f"{100 * one['memory']['growth']:+.1f} %"
        lines.append([f"{name} ({client})", f"{one['requests']:,}", *cells, growth])
    head = ["server (client)", "requests", "swaps", "failed", "another user's", "another version's", "memory"]
    return markdown(head, lines)


def _kill(found: Mapping[str, Any]) -> str:
    """What became of the server that was killed."""
    one = found["vllm"]
    seconds, requests, live = one["away"]["seconds"], one["away"]["requests"], "" if one["kept"] else "NOT "
    return (
        f"vLLM was killed {one['kills']} time (SIGKILL) and answered again after {seconds:.0f} s;"
        f" {requests:,} requests of that time are not counted. Nothing was published, and what was live"
        f" before was {live}live again. Memory is that of the second process."
    )


def _kernels(found: Mapping[str, Any], kind: str) -> str:
    """A thousand users at one layer: the ways beside each other; how far each is from the memory's floor."""
    lines = []
    rows = (row for row in found["rows"] if row.get("kind", "shared") == kind)
    for row in (row for row in rows if row["users"] == _KERNEL_USERS):
        cells = [row["module"], str(row["rank"]), str(row["batch"])]
        for name in (kind, "gathered", "segments"):
            cells.append(f"{row['microseconds'][name]:,.0f} ({row['over_floor'][name]:.1f}x)")
        cells += [f"{row[f'lora_over_{kind}']:.1f}x", f"{100 * row[f'{kind}_over_base']:.1f} %"]
        lines.append(cells)
    ours = {"shared": "shared basis", "own": "own components"}[kind]
    head = ["module", "rank", "tokens", ours, "LoRA, gathered", "by user", "ratio", "of layer"]
    what = f"{found['dtype']}, {found['bytes_per_second'] / 1e9:.1f} GB/s, {_KERNEL_USERS:,} users"
    return f"{markdown(head, lines)}\n\n{what}. {circumstances_line(found)}"


def _soak_line(found: Mapping[str, Any]) -> str:
    """Both servers in one sentence."""
    both = [found["vllm"], found["embedded"]]
    total = {
        key: sum(one[key] for one in both) for key in ("requests", "failed", "wrong_user", "wrong_version")
    }
    swaps = f"{both[0]['swaps']}" if both[0]["swaps"] == both[1]["swaps"] else "several"
    growth = " and ".join(f"{100 * one['memory']['growth']:+.1f} %" for one in both)
    return (
        f"{found['minutes']:g} minutes of mixed load by the real `openai` client on vLLM and `lorax-client`"
        f" on the embedded server, {swaps} bundle swaps in between: of {total['requests']:,} requests"
        f" {total['failed']} failed, {total['wrong_user']} got another user's text and"
        f" {total['wrong_version']} another version's; memory {growth}."
    )


def plot(found: Mapping[str, Any]) -> Path:
    """Share of the base's throughput by number of users."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in found["rows"][0]["tokens_per_second"]:
        for zipf, style in ((False, "o-"), (True, "x:")):
            turns = (r for r in found["rows"] if r["zipf"] == zipf and name in r["to_base"])
            rows = sorted(turns, key=lambda r: r["users"])
            x, y = [r["users"] for r in rows], [100 * r["to_base"][name] for r in rows]
            axes.plot(x, y, style, color=_COLOURS[name], label=None if zipf else _NAMES[name])
    axes.set(xscale="log", xlabel="users", ylabel="throughput, % of vLLM without LoRA", ylim=(0, None))
    axes.set_title("16 requests under way; uniform traffic (lines) and Zipf (dotted)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return save_plot(figure, "serve")


def write_pages() -> None:
    """Draw the plot, fill the pages."""
    if found := read_result("serve"):
        plot(found)
    fill(blocks(), *PAGES)


if __name__ == "__main__":
    write_pages()
