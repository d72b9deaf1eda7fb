"""`soppu compress` and `soppu inspect`: PEFT folders into one bundle file, and what a bundle file holds.

Not for the catalogue: neither command looks at a registry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from soppu.config import CompressConfig

if TYPE_CHECKING:
    from soppu.compress import Bundle

_DEFAULT = CompressConfig()
_DTYPES = ("float16", "bfloat16", "float32")


@click.command("compress")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--rank", type=int, default=_DEFAULT.rank, show_default=True, help="Shared rank k.")
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    default=_DEFAULT.dtype,
    show_default=True,
    help="Storage type.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Bundle to write."
)
@click.option("--device", default=_DEFAULT.device, show_default=True, help="auto, cpu, cuda or cuda:N.")
def compress_command(folders: tuple[str, ...], rank: int, dtype: str, *, out: Path, device: str) -> None:
    """Compress the PEFT adapters in DIR... into one bundle.

    Every folder is one user's adapter, named after the folder; USER=DIR gives another name. The table shows
    the relative error of every user's adapter as stored, and the bytes of its weights file.
    """
    from soppu import adapter  # torch: not for `soppu --help`
    from soppu.compress import CompressOptions, compress

    options = CompressOptions(rank=rank, dtype=dtype, device=device)
    named = _users(folders)
    adapters = {user: adapter.read(folder) for user, folder in named.items()}
    with tqdm(desc="compress", unit="module", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        bundle = compress(adapters, options, progress=show)
    bundle_id = bundle.save(out)

    before = {user: (folder / adapter.WEIGHTS_FILE).stat().st_size for user, folder in named.items()}
    errors = bundle.report.relative_error
    rows = [(user, f"{errors[user]:.5f}", f"{before[user]:,}") for user in bundle.users]
    _table(("user", "relative error", "bytes before"), rows)
    _summary(bundle)
    total, after = sum(before.values()), out.stat().st_size
    click.echo(f"on disk      {total:,} -> {after:,} bytes ({total / after:.2f}x)")
    click.echo(f"bundle       {out}\nid           {bundle_id}")


@click.command("inspect")
@click.argument("bundle", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect_command(bundle: Path, *, as_json: bool) -> None:
    """Check the file BUNDLE and print its users, modules, shared ranks, certificate and errors."""
    from soppu import files
    from soppu.compress import Bundle  # torch: not for `soppu --help`

    loaded, bundle_id, size = Bundle.load(bundle), files.sha256_file(bundle), bundle.stat().st_size
    if as_json:
        facts = {"id": bundle_id, "bytes": size} | _description(loaded)
        click.echo(json.dumps(facts, indent=2))
        return
    errors = loaded.report.relative_error
    users = zip(loaded.users, loaded.adapter_ids, strict=True)
    _table(("user", "relative error", "adapter"), [(user, f"{errors[user]:.5f}", a) for user, a in users])
    _table(
        ("module", "out x in", "k", "cores", "mean error", "bound", "steps"),
        [_module_row(loaded, name) for name in loaded.modules],
    )
    _summary(loaded)
    click.echo(f"base model   {loaded.base_model or 'unnamed'} {loaded.base_hash[:12]}")
    click.echo(f"on disk      {size:,} bytes\nid           {bundle_id}")


def _users(folders: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in folders:
        user, separator, path = text.partition("=")
        if not separator or Path(text).is_dir():
            user, path = Path(text).resolve().name, text
        if not user:
            raise click.BadParameter(f"{text!r} names no user; expected DIR or USER=DIR")
        if user in named:
            raise click.BadParameter(f"user {user!r} is given twice; tell them apart with USER=DIR")
        named[user] = Path(path)
    return named


def _module_row(bundle: Bundle, name: str) -> tuple[str, ...]:
    module, report = bundle.modules[name], bundle.report
    errors = list(report.module_error[name].values())
    return (
        name,
        f"{module.U.shape[0]} x {module.V.shape[0]}",
        str(module.k),
        "full" if module.c is None else f"thin, {module.c}",
        f"{sum(errors) / len(errors):.5f}",
        f"{report.certificates[name].relative_lower_bound:.5f}",
        str(report.steps[name]),
    )


def _summary(bundle: Bundle) -> None:
    report, overall = bundle.report, bundle.report.overall
    before, after = report.parameters_before, report.parameters_after
    click.echo(f"users        {len(bundle.users)}, modules {len(bundle.modules)}, rank {report.k} asked")
    click.echo(f"error        mean {report.relative_error_mean:.5f}, worst {report.relative_error_max:.5f}")
    click.echo(
        f"certificate  {overall.relative_achieved:.5f} root mean square over users and modules, unrounded; "
        f"no shared basis of this rank goes below {overall.relative_lower_bound:.5f}"
    )
    click.echo(f"parameters   {before:,} -> {after:,} ({before / after:.2f}x)")


def _description(bundle: Bundle) -> dict[str, Any]:
    return {
        "base_model": bundle.base_model,
        "base_hash": bundle.base_hash,
        "users": dict(zip(bundle.users, bundle.adapter_ids, strict=True)),
        "modules": {
            name: {
                "out": module.U.shape[0],
                "in": module.V.shape[0],
                "k": module.k,
                "c": module.c,
                "ranks": list(bundle.ranks[name]),
            }
            for name, module in bundle.modules.items()
        },
        "report": bundle.report.to_dict(),
    }


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())
    click.echo()
