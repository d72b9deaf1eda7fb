"""`soppu inspect`: check a bundle file and say what it holds, as a whole or of one user."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from soppu import files
from soppu.commands.describe import summary, table
from soppu.commands.options import BUNDLE
from soppu.compress import Bundle
from soppu.compress.fleet.survey import delta_norm
from soppu.compress.numbers.components import Components

_KINDS = ("shared", "mixed", "own")


@click.command("inspect")
@BUNDLE
@click.option("--user", help="Only what concerns this user.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect_command(bundle: Path, *, user: str | None, as_json: bool) -> None:
    """Check the file BUNDLE, every page of it, and print what it holds.

    For a module: its shape, the shared rank k and the bits of its output and input basis (of each cluster),
    the share of its components that are of each kind, the errors as stored, and the least error that bases of
    these ranks could have alone. A component is one rank-one part of one user's change: shared if both its
    sides are coordinates in the bases, own if both are numbers of the user's own, mixed if there is some of
    each.

    A user who was taken out of a bundle has still shaped its bases: the adapters of such users are listed.
    """
    loaded, size = Bundle.load(bundle), bundle.stat().st_size
    facts = {"id": files.sha256_file(bundle), "bytes": size, "parts": _bytes_by_part(bundle)}
    if user is not None:
        loaded.index(user)  # BundleError for somebody the bundle does not hold
    if as_json:
        told = facts | _description(loaded) if user is None else _of_user(loaded, user)
        click.echo(json.dumps(told, indent=2))
    elif user is not None:
        _print_user(_of_user(loaded, user))
    else:
        _print_bundle(loaded, facts)


def _print_bundle(bundle: Bundle, facts: dict[str, Any]) -> None:
    told = _description(bundle)
    errors = bundle.report.relative_error
    users = [
        (name, f"{errors[name]:.5f}", str(item["cluster"]), item["adapter_id"])
        for name, item in told["users"].items()
    ]
    table(("user", "relative error", "cluster", "adapter"), users)
    heads = ("module", "out x in", "k", "bits", *_KINDS, "mean error", "bound", "steps")
    table(heads, [_module_row(bundle, name, item) for name, item in told["modules"].items()])
    summary(bundle, facts["bytes"])
    click.echo(f"base model   {bundle.base_model or 'unnamed'} {bundle.base_hash[:12]}")
    if bundle.basis_saw:
        click.echo(f"bases saw    {', '.join(bundle.basis_saw)} (taken out since; a refit forgets them)")
    parts = ", ".join(f"{name} {count:,}" for name, count in facts["parts"].items())
    click.echo(f"on disk      {facts['bytes']:,} bytes: {parts}\nid           {facts['id']}")


def _module_row(bundle: Bundle, name: str, told: dict[str, Any]) -> tuple[str, ...]:
    report, components = bundle.report, told["components"]
    errors, total = list(report.module_error[name].values()), sum(components.values())
    shares = (f"{100 * components[kind] / total:.0f} %" if total else "-" for kind in _KINDS)
    bound = report.certificates[name].relative_lower_bound
    return (
        name,
        f"{told['out']} x {told['in']}",
        "/".join(map(str, told["k"])),
        " ".join("/".join(map(str, pair)) for pair in told["widths"]),
        *shares,
        f"{sum(errors) / len(errors):.5f}" if errors else "-",
        f"{bound:.5f}" if any(told["k"]) and report.clusters == 1 else "-",
        str(report.steps[name]),
    )


def _print_user(told: dict[str, Any]) -> None:
    heads = ("module", "rank", *_KINDS, "relative error")
    rows = [
        (name, str(item["rank"]), *(str(item["components"][kind]) for kind in _KINDS), f"{item['error']:.5f}")
        for name, item in told["modules"].items()
    ]
    table(heads, rows)
    click.echo(f"user         {told['user']}, adapter {told['adapter_id']}, cluster {told['cluster']}")
    click.echo(f"error        {told['error']:.5f}, norm {told['norm']:.5g}")


def _description(bundle: Bundle) -> dict[str, Any]:
    counts = {name: Counter(dict.fromkeys(_KINDS, 0)) for name in bundle.shapes}
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            counts[name].update(_kinds(part))
    return {
        "base_model": bundle.base_model,
        "base_hash": bundle.base_hash,
        "basis_saw": list(bundle.basis_saw),
        "users": {
            user: {"adapter_id": adapter_id, "cluster": cluster}
            for user, adapter_id, cluster in zip(
                bundle.users, bundle.adapter_ids, bundle.cluster.tolist(), strict=True
            )
        },
        "modules": {
            name: {
                "out": o,
                "in": i,
                "k": [side.k for side in bundle.bases[name][0]],
                "widths": [[side.width for side in pair] for pair in bundle.bases[name]],
                "components": dict(counts[name]),
                "ranks": ranks,
            }
            for (name, (o, i)), ranks in zip(bundle.shapes.items(), bundle.ranks.tolist(), strict=True)
        },
        "report": bundle.report.to_dict(),
    }


def _of_user(bundle: Bundle, user: str) -> dict[str, Any]:
    index, report = bundle.index(user), bundle.report
    ranks = dict(zip(bundle.shapes, bundle.ranks[:, index].tolist(), strict=True))
    return {
        "user": user,
        "adapter_id": bundle.adapter_ids[index],
        "cluster": int(bundle.cluster[index]),
        "norm": _norm(bundle, user),
        "error": report.relative_error[user],
        "modules": {
            name: {
                "rank": ranks[name],
                "components": _kinds(part),
                "error": report.module_error[name][user],
            }
            for name, part in bundle.of(user).items()
        },
    }


def _norm(bundle: Bundle, user: str) -> float:
    """Of the user's change as stored; what gains are relative to may be a power of 4 instead."""
    pairs = bundle.reconstruct(user).pairs.values()
    return math.sqrt(math.fsum(delta_norm(pair.B, pair.A) ** 2 for pair in pairs))


def _kinds(part: Components) -> dict[str, int]:
    """How many components are shared, own, and mixed."""
    sides = (part.left, part.right)
    shared = ~part.own
    own = (sides[0].coords_width == 0) & (sides[1].coords_width == 0) & part.own
    counts = int(shared.sum()), len(part) - int(shared.sum()) - int(own.sum()), int(own.sum())
    return dict(zip(_KINDS, counts, strict=True))


def _bytes_by_part(path: Path) -> dict[str, int]:
    """Bytes of the bases, of the users' pages, and of all the rest, from the header of a checked file."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = {"bases": 0, "pages": 0}
    for name, entry in header.items():
        part = "pages" if name.startswith("page.") else name
        if part in found:
            start, end = entry["data_offsets"]
            found[part] += end - start
    return found | {"metadata": path.stat().st_size - sum(found.values())}
