"""Tables of federations, from the result files to between the marks of docs/federation.md.

python -m benchmarks.federation_page
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import core_federation_page
from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "federation.md"
MARKS = (
    "federation-study",
    "federation-upper",
    "federation-parts",
    "federation-client",
    "federation-scale",
    "federation-kills",
    "federation-cores",
)
_MODES = ("base", "shared", "finetune", "served", "fedsa", "dual", "local", "upper")
_NAMES = {
    "base": "base model",
    "shared": "one shared adapter for all (FedBiOT)",
    "finetune": "`finetune`: own adapter, from the shared one",
    "served": "what each user's validation text chooses",
    "fedsa": "`fedsa`: A shared, B own",
    "dual": "`dual`: shared and own rank",
    "local": "`local`: own adapter, nothing shared",
    "upper": "LoRA on every layer of the whole model",
}
Row = Mapping[str, Any]


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    made: dict[str, str] = {}
    if found := read_result("federation"):
        line = circumstances_line(found)
        made["federation-study"] = f"{_study(found['rows'])}\n\n{line}"
        made["federation-upper"] = _upper(found["rows"])
        made["federation-parts"] = _parts(found["rows"])
    if found := read_result("client_step"):
        made["federation-client"] = _client(found)
    if found := read_result("federation_scale"):
        made["federation-scale"] = f"{_scale(found)}\n\n{circumstances_line(found)}"
    if found := read_result("federation_kills"):
        made["federation-kills"] = f"{_kills(found)}\n\n{circumstances_line(found)}"
    if found := read_result("core_federation"):
        made["federation-cores"] = core_federation_page.told(found)
    return made


def _study(rows: list[Row]) -> str:
    """By corpus: the modes with their plain settings, losses and what they win over the shared adapter."""
    table = [
        [row["corpus"], _NAMES[row["mode"]], f"{row['mean']:.3f}", *_won(row), _emulated(row), *_carried(row)]
        for corpus in dict.fromkeys(row["corpus"] for row in rows)
        for mode in _MODES
        for row in rows
        if (row["corpus"], row["mode"]) == (corpus, mode) and "," not in row["arm"]
        if mode != "served" or row["arm"] == "finetune"
    ]
    head = ["text", "trained", "loss", "won over shared (95 % of users' mean)", "better for", "worst user"]
    return markdown([*head, "on the emulator", "MB up", "MB down"], table)


def _emulated(row: Row) -> str:
    """The loss of validation text on the emulator at the end, of what a row is of."""
    key = {"base": "", "served": "", "shared": "shared_loss"}.get(row["mode"], "emulator_loss")
    return f"{row['rounds'][-1][key]:.3f}" if key else ""


def _upper(rows: list[Row]) -> str:
    """How much of what the whole model could win `finetune` wins, on the mean of the users."""
    told = []
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        mean = {
            (row["arm"], row["mode"]): row["mean"]
            for row in rows
            if row["corpus"] == corpus and row["arm"] in ("finetune", "upper")
        }
        if most := mean.get(("upper", "upper")):
            starts = mean["finetune", "base"], mean["finetune", "shared"]
            base, shared = ((start - mean["finetune", "finetune"]) / (start - most) for start in starts)
            told.append(
                f"{100 * base:.0f} % over the base model and {100 * shared:.0f} % over shared ({corpus})"
            )
    return "Of what LoRA on every layer wins, `finetune` wins " + "; ".join(told) + "."


def _won(row: Row) -> list[str]:
    if row["mode"] == "shared" or row.get("interval") is None:
        return ["", "", ""]
    low, high = row["interval"]
    better = f"{row['better_than_shared']} of {row['users']}"
    return [f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f})", better, f"{-row['worst']:+.3f}"]


def _carried(row: Row) -> list[str]:
    if row["mode"] == "base":
        return ["", ""]
    return [f"{row[way] / 1e6:.1f}" for way in ("bytes_up", "bytes_down")]


def _parts(rows: list[Row]) -> str:
    """`finetune` with one thing changed, on the same users."""
    table = []
    for row in sorted(rows, key=lambda row: row["corpus"], reverse=True):
        name, _, change = row["arm"].partition(", ")
        if name == row["mode"] == "finetune":
            before, after = row["align"]["before"], row["align"]["after"]
            states = f"{before['l2']:.3f} to {after['l2']:.3f}"
            table.append([row["corpus"], change or "as configured", f"{row['mean']:.3f}", *_won(row), states])
    head = ["text", "`finetune`", "loss", "won over shared (95 % of users' mean)", "better for", "worst user"]
    return markdown([*head, "emulator's error of hidden states"], table)


def _client(found: Mapping[str, Any]) -> str:
    """Steps and memory of a client, as a share of what LoRA on the whole model takes."""
    table = []
    for dtype, kind in (("bfloat16", found.get("bfloat16")), ("float32", found.get("float32"))):
        for beta in ("0.2", "0.5") if kind else ():
            row, kept = (kind["steps"][f"client beta {beta}{tail}"] for tail in ("", ", cached"))
            memory = kind["memory"][f"client beta {beta}"]["above_imports"]
            whole = kind["memory"]["full"]["above_imports"]
            table.append(
                [
                    dtype,
                    beta,
                    f"{row['times_full']:.2f}x",
                    f"{kept['times_full']:.2f}x",
                    f"{row['times_peft']:.2f}x",
                    f"{memory / 1e6:.0f} of {whole / 1e6:.0f} MB",
                ]
            )
    head = ["frozen weights", "layers left out", "a step is faster", "with states kept", "than PEFT's own"]
    return markdown([*head, "peak memory, of the whole model's"], table)


def _scale(found: Mapping[str, Any]) -> str:
    told = []
    if memory := found.get("memory"):
        few, many = memory["few"], memory["many"]
        quarters = ", ".join(f"{held / 1e9:.2f}" for held in many["median_bytes_by_quarter"])
        told.append(
            f"{many['users']} simulated users on one machine: {many['adapters']} adapters in"
            f" {many['seconds'] / 60:.1f} minutes. All processes together held at most"
            f" {many['peak_bytes'] / 1e9:.2f} GB, {memory['peak_ratio']:.2f} times what {few['users']} users"
            f" took; the medians of the run's quarters are {quarters} GB."
        )
    if overhead := found.get("overhead"):
        runs = {way: ", ".join(f"{s:.0f}" for s in took) for way, took in overhead["seconds"].items()}
        told.append(
            f"The demo's training by Prefect, Flower and Ray took {runs['pipeline']} s from the command to"
            f" the last adapter, a bare loop over the same clients in one process {runs['loop']} s:"
            f" {100 * overhead['overhead']:+.0f} %. The loop has all cores in one process, the simulation"
            " an actor of one thread for each core."
        )
    return "\n\n".join(told)


def _kills(found: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(row["killed"] for row in found["kills"])
    table = []
    for kind in kinds:
        rows = [row for row in found["kills"] if row["killed"] == kind]
        alone = sum(row["by"] == "itself" for row in rows)
        whole = sum(row["users"] == found["users"] for row in rows)
        table.append([kind, str(len(rows)), str(alone), str(len(rows) - alone), f"{whole} of {len(rows)}"])
    head = ["killed while users train", "runs", "ended by itself", "by the same command", "with every user"]
    return markdown(head, table) + f"\n\nUsers lost in all runs together: {found['lost_users']}."


def main() -> None:
    """Fill the page."""
    fill(blocks(), PAGE)
    print(f"written: the tables of {PAGE}")


if __name__ == "__main__":
    main()
