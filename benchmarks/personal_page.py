"""Tables and plot of docs/personal.md, from batched.json, join.json and personal.json to its marks.

python -m benchmarks.personal_page
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import join_page
from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.personal_arms import BLOCKS, OURS
from benchmarks.personal_front import beside_controls, by_corpus, front, smallest, won
from benchmarks.personal_ground import DTYPES
from benchmarks.personal_plot import USUAL, plot
from benchmarks.record import ROOT

PAGES = ROOT / "docs" / "personal.md", ROOT / "README.md"
MARKS = (
    *("batched", "join", "personal-finding", "personal-study", "personal-controls", "personal-basis"),
    *("personal-parts", "personal-noise", "personal-membership", "personal-training", "readme-personal"),
)
_NAMES = {"tiny": "random model of width 32, two layers", "smollm2": "last four layers of SmolLM2-135M"}
_ARMS = {
    "base": "base model",
    "shared": "the shared adapter, where all others begin",
    "shared, as many steps": "shared, trained for as many steps more",
    "full LoRA": "full LoRA r=8, from the shared one",
    "full LoRA, projected": "that LoRA, projected on the basis k={k}",
    "LoRA": "LoRA r={own} beside shared",
    "core": "**core k={k}**",
    "core beside shared": "**core k={k} beside shared**",
    "mean core": "mean of the cohort's cores, k={k}",
    "learnt basis": "**core k={k} in a learnt basis, beside shared**",
    "federated basis": "**core k={k} in a federated basis, beside shared**",
    "random basis": "core k={k} in a random basis, beside shared",
    "basis of the weights": "core k={k} in the weights' own basis (LoRA-XS), beside shared",
    "Fed-SB": "one core k={k} for all, in the weights' basis (Fed-SB)",
    "FedSA": "B alone, A shared (FedSA)",
    "unilora": "PEFT `unilora`, beside shared",
    "vera": "PEFT `vera` r={k}, beside shared",
    "tinylora": "PEFT `tinylora` u={k}, beside shared",
}
Row = Mapping[str, Any]


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    made = {}
    if found := read_result("batched"):
        made["batched"] = f"{_table(found)}\n\n{circumstances_line(found)}"
    if found := read_result("join"):
        made["join"] = join_page.told(found)
    found = read_result("personal")
    if rows := [row for row in found.get("rows", []) if "gain" in row]:
        made["personal-finding"] = "\n".join(_finding(*one) for one in by_corpus(rows))
        made["readme-personal"] = "\n".join(_short(*one) for one in by_corpus(rows))
        made["personal-study"] = (
            f"{_drawn(rows)}{_study(rows)}\n\n{_missing(rows)}{circumstances_line(found)}"
        )
        made["personal-controls"] = _controls(rows)
        made["personal-basis"] = _of_users(rows)
        made["personal-parts"] = in_parts(found.get("parts", []), rows)
        checks = map(_training, *zip(*found["corpora"].items(), strict=True))
        made["personal-training"] = " ".join([_head(found["settings"]), _dtypes(rows), *filter(None, checks)])
        made["personal-noise"] = _noise(found.get("private", []), rows)
        made["personal-membership"] = _membership(found.get("membership", []))
    return {name: text for name, text in made.items() if text}


def name_of(row: Row) -> str:
    """What an arm is called on the page."""
    name = _ARMS[row["arm"]].format(k=row["k"], own=row["own"])
    if row["own"] and row["arm"] != "LoRA":
        name += f" **+ own rank {row['own']}**"
    name += f", `{' '.join(row['modules'])}`" if row.get("modules") else ""
    return name + (f", of {row['basis_users']} users" if row["basis_users"] not in (0, USUAL) else "")


def _finding(corpus: str, rows: Sequence[Row]) -> str:
    """Whether there is a form that keeps enough, in one item of a list."""
    full = next((row for row in rows if row["arm"] == "full LoRA"), None)
    ours = [row for row in rows if row["arm"] in OURS]
    if full is None or not ours:
        return f"- {corpus}: no core has been measured beside a full LoRA yet."
    if full["kept"] is None:
        return (
            f"- {corpus}: a full LoRA of a user's own wins nothing over shared, so there is nothing to keep."
        )
    found = smallest(rows)
    best = found or max(ours, key=lambda row: row["kept"])
    (low, high), fewer = best["over_full_interval"], full["numbers"] / best["numbers"]
    told = f"{name_of(best)}, {100 * best['kept']:.0f} % with {best['numbers']:,} numbers, {fewer:.1f}x fewer"
    mean = f"It wins {best['gain']:+.3f} over shared in the mean and {-best['worst']:+.3f} for the worst user"
    lora = f"the full LoRA {full['gain']:+.3f} and {-full['worst']:+.3f}"
    apart = f"user by user it is better than that by {best['over_full']:+.4f} ({low:+.4f} to {high:+.4f})"
    keeps = "the smallest form that keeps 95 % of the full LoRA's gain over shared is"
    if not found:
        keeps = (
            "**no** form of ours that was tried keeps 95 % of the full LoRA's gain over shared; most keeps"
        )
    if not any(row["arm"] == "shared, as many steps" for row in rows):
        apart += ". Shared is not yet the one trained for as many steps more, which has to be measured"
    return f"- {corpus}: {keeps} {told}. {mean}, {lora}; {apart}."


def _short(corpus: str, rows: Sequence[Row]) -> str:
    """What a user's own numbers are worth: a full LoRA, the core that keeps enough, the smallest one."""
    full = next((row for row in rows if row["arm"] == "full LoRA"), None)
    ours = [row for row in rows if row["arm"] in OURS]
    if full is None or not ours or full["kept"] is None:
        return _finding(corpus, rows)
    forms = [smallest(rows), min(ours, key=lambda row: (row["numbers"], -row["gain"]))]
    told = [
        f"{name_of(row)} ({row['numbers']:,} numbers, {full['numbers'] / row['numbers']:.1f}x fewer) wins"
        f" {row['gain']:+.3f}, {100 * row['kept']:.0f} % of that"
        for row in forms
        if row
    ]
    most = max(one["k"] for one in forms if one)  # of a random basis, the nearest that was measured
    drawn = [row for row in rows if row["arm"] == "random basis" and row["k"] <= most]
    if nearest := max(drawn, key=lambda row: row["k"], default=None):
        told.append(
            f"without the users' basis, a {name_of(nearest)}, wins {nearest['gain']:+.3f},"
            f" {100 * nearest['kept']:.0f} %"
        )
    (low, high), better = full["interval"], f"{full['better_than_shared']} of {full['users']} users"
    lora = f"a LoRA of a user's own wins {full['gain']:+.3f} ({low:+.3f} to {high:+.3f}), better for {better}"
    return f"- {corpus}: {lora}; {'; '.join(dict.fromkeys(told))}."


def _drawn(rows: Sequence[Row]) -> str:
    """The plot, once there is something of ours on it."""
    there = any(row["arm"] in OURS for row in rows)
    return "![won over shared by numbers a user](images/personal-front.png)\n\n" if there else ""


def _study(rows: Sequence[Row]) -> str:
    """By corpus, in order of numbers: losses, what is won, what is sent. A star: on the front."""
    table = []
    for corpus, own in by_corpus(rows):
        ordered = sorted(own, key=lambda row: (row["numbers"], row["gain"]))
        best = front([(row["numbers"], row["gain"]) for row in ordered])
        for place, row in enumerate(ordered):
            star = " *" if place in best and row["numbers"] else ""
            table.append(
                [corpus, name_of(row), f"{row['numbers']:,}{star}", f"{row['mean']:.3f}", *_won(row)]
            )
    head = [
        "text",
        "trained",
        "numbers a user",
        "loss",
        "won over shared (95 % of users' mean)",
        "better for",
    ]
    return markdown([*head, "worst user", "of the full LoRA's gain", "kB up", "MB down", "s a user"], table)


def _missing(rows: Sequence[Row]) -> str:
    """The arms of the study that have no row yet, by name and how many of each; a corpus a sentence."""
    told = []
    for corpus, own in by_corpus(rows):
        there = {(row["arm"], row["k"], row["own"], row["basis_users"], *row["modules"]) for row in own}
        arms = (arm for block in BLOCKS for arm in block)
        left = Counter(
            arm.name for arm in arms if (arm.name, arm.k, arm.own, arm.basis_users, *arm.modules) not in there
        )
        names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in left.items())
        told += [f"Not measured yet on {corpus} with these settings: {names}."] if names else []
    return "".join(f"{one}\n\n" for one in told)


def _won(row: Row) -> list[str]:
    low, high = row["interval"]
    kept = f"{100 * row['kept']:.0f} %" if row.get("kept") is not None and row["numbers"] else ""
    sent = [f"{row['bytes_up'] / 1e3:.1f}", f"{row['bytes_down'] / 1e6:.2f}", f"{row['seconds']:.1f}"]
    if row["arm"] == "shared, as many steps":
        return ["", "", "", "", *sent]
    gained = f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
    better = f"{row['better_than_shared']} of {row['users']}"
    return [gained, better, f"{-row['worst']:+.3f}", kept, *sent]


def _head(settings: Mapping[str, Any]) -> str:
    """Which tokens the head has that is trained through."""
    others = settings.get("others", 0)
    drawn = f", and {others:,} others that stand for all the rest" if others else " alone"
    return f"The head that is trained through has the tokens of all training texts{drawn}."


def _dtypes(rows: Sequence[Row]) -> str:
    """What the layers computed in, corpus by corpus."""
    told = {corpus: {row.get("compute", DTYPES[0]) for row in own} for corpus, own in by_corpus(rows)}
    return f"In training the layers computed in {', '.join(f'{min(d)} on {c}' for c, d in told.items())}."


def _training(corpus: str, told: Row) -> str:
    """What the cheaper training comes to beside the plain one, of one corpus; nothing where not measured."""
    if not (found := told.get("training")):
        return ""
    so, whole, exact = (found[way] for way in ("as studied", "all tokens", "float32"))
    apart = max(whole["apart"], exact["apart"])
    return (
        f"On {corpus} ({told['tokens']:,} tokens) the full LoRAs of the users who choose step sizes come to"
        f" {so['mean']:.4f} so, to {whole['mean']:.4f} through a head of all tokens, and in float32 as well"
        f" to {exact['mean']:.4f}; no user's loss is further apart than {apart:.4f}."
    )


def _controls(rows: Sequence[Row]) -> str:
    table = []
    for corpus, own in by_corpus(rows):
        if not any(row["arm"] in OURS for row in own):
            continue
        for control, best, apart in sorted(beside_controls(own), key=lambda one: one[0]["numbers"]):
            cells = ["none has so few", "", "", ""]
            if best is not None and apart is not None:
                mean, low, high = apart
                verdict = "ours" if low > 0 else "the control" if high < 0 else "undecided"
                cells = [
                    name_of(best),
                    f"{best['numbers']:,}",
                    f"{mean:+.4f} ({low:+.4f} to {high:+.4f})",
                    verdict,
                ]
            table.append([corpus, name_of(control), f"{control['numbers']:,}", *cells])
    head = [
        "text",
        "control",
        "numbers",
        "ours with no more",
        "numbers",
        "ours wins (95 % of users' mean)",
        "better",
    ]
    return markdown(head, table) if table else ""


def _of_users(rows: Sequence[Row]) -> str:
    """Cores by how many users their basis is of, where there is more than one such number."""
    table = []
    for corpus, own in by_corpus(rows):
        cores = [row for row in own if row["arm"] in OURS and not row["own"]]
        for kind in sorted({(row["arm"], row["k"], *row["modules"]) for row in cores}):
            some = [row for row in cores if (row["arm"], row["k"], *row["modules"]) == kind]
            for row in sorted(some, key=lambda row: row["basis_users"]) if len(some) > 1 else []:
                kept = "" if row["kept"] is None else f"{100 * row['kept']:.0f} %"
                name = name_of({**row, "basis_users": 0})
                table.append(
                    [corpus, name, str(row["basis_users"]), f"{row['mean']:.3f}", *_won(row)[:1], kept]
                )
    head = [
        "text",
        "trained",
        "users in the basis",
        "loss",
        "won over shared (95 % of users' mean)",
        "of the full LoRA's",
    ]
    return markdown(head, table) if table else ""


def in_parts(parts: Sequence[Row], rows: Sequence[Row]) -> str:
    """Two bases that users choose from, beside the one of as many users, or of those there are the most."""
    table = []
    for row in parts:
        alike = [one for one in rows if one["arm"] == "federated basis" and _place(one) == _place(row)]
        one = max(alike, key=lambda one: (one["basis_users"] <= row["basis_users"], one["basis_users"]))
        mean, low, high = won(row, one)
        first = f"{list(row['choice'].values()).count(0)} of {len(row['choice'])}"
        each = " and ".join(f"{loss:.3f}" for loss in row["mean_of_each"])
        table.append(
            [
                *(row["corpus"], row["arm"], " and ".join(map(str, row["users_of_each"]))),
                *(f"{row['mean']:.3f}", each, first, f"{row['mean_of_better']:.3f}"),
                f"{mean:+.4f} ({low:+.4f} to {high:+.4f}), of {one['basis_users']} users",
            ]
        )
    head = ["text", f"cores k={parts[0]['k']}" if parts else "", "users of each", "loss of who chose"]
    head += ["of all in the one, in the other", "who chose the one", "if all had chosen what is better"]
    return markdown([*head, "won over one basis (95 % of users' mean)"], table) if table else ""


def _place(row: Row) -> tuple[object, ...]:
    return row["corpus"], row["k"], *row["modules"], row.get("own") or 0


def _noise(noised: Sequence[Row], rows: Sequence[Row]) -> str:
    if not noised:
        return ""
    shared, table, decided = {row["corpus"]: row for row in rows if row["arm"] == "shared"}, [], []
    for row in noised:
        epsilon = "no noise" if row["epsilon"] is None else f"{row['epsilon']:g}"
        hidden = [f"{row['noise']:.2f}", f"{row['clip']:.3g}"] if row["epsilon"] else ["", ""]
        mean, low, high = won(row, shared[row["corpus"]])
        decided += [low > 0] if row["epsilon"] else []
        told = [f"{row['mean']:.3f}", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"]
        table.append([row["corpus"], name_of(row), f"{row['numbers']:,}", epsilon, *hidden, *told])
    head = ["text", "trained", "numbers", "epsilon", "noise, in clipping norms", "clipping norm", "loss"]
    head += ["won over the shared adapter (95 % of users' mean)"]
    words = f"With noise, {sum(decided) or 'none'} of {len(decided)} won decidedly over the shared adapter."
    return f"{words}\n\n{markdown(head, table)}"


def _membership(attacked: Sequence[Row]) -> str:
    table = []
    for row in attacked:
        low, high = row["interval"]
        told = [f"{row['mean']:.3f} ({low:.3f} to {high:.3f})", f"{row['knowing_shared']:.3f}"]
        table.append([row["corpus"], name_of(row), *told])
    head = [
        "text",
        "trained",
        "AUC of a threshold on the loss (95 % of users' mean)",
        "knowing the loss with shared",
    ]
    return markdown(head, table) if table else ""


def _table(found: dict[str, Any]) -> str:
    head = ["trained", "users", "core", "user-steps a second, one by one", "at once", "ratio", "losses apart"]
    rows = [
        [
            _NAMES[name],
            str(one["users"]),
            " x ".join(map(str, one["core"])),
            f"{one['user_steps_a_second_one_by_one']:.1f}",
            f"{one['user_steps_a_second']:.1f}",
            f"{one['ratio']:.1f}",
            f"{one['max_loss_difference']:.1e}",
        ]
        for name, one in found["sizes"].items()
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    told = [row for row in read_result("personal").get("rows", []) if "gain" in row]
    if _drawn(told):
        plot(told)
    fill(blocks(), *PAGES)
