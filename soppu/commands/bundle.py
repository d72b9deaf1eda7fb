"""`soppu project`, `remove` and `export`: change a bundle without a refit, and take adapters out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from soppu import models
from soppu.commands.describe import table
from soppu.commands.options import BASE, BUNDLE, OUT, named_folders, reader
from soppu.compress import Bundle, forget, project
from soppu.compress.edit import QUEUED
from soppu.compress.lorax_export import export

QUEUED_EXIT = 3


@click.command("project")
@BUNDLE
@click.argument("folders", nargs=-1, required=True, metavar="USER=DIR...")
@OUT
@click.option(
    "--max-error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    required=True,
    help="Relative error a new user may have at most.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(0),
    default=0,
    help="Bytes a new user may take at most; default: what the adapter has at 16 bits a number.",
)
@BASE
@click.pass_context
def project_command(
    ctx: click.Context, /, bundle: Path, folders: tuple[str, ...], *, out: Path, base: str, **limits: Any
) -> None:
    """Add new users to BUNDLE without touching anybody else's numbers, and write NEW.

    USER=DIR names a PEFT folder, as for `soppu compress`. Every new user has one of three outcomes:

    \b
      basis     coordinates in the shared bases are exact enough: the fewest bytes
      residual  numbers of the user's own were needed
      queued    neither is within --max-error and --max-bytes: not added, waits for the next compression

    NEW is written with everybody who was added. Exit code 3 says that somebody was queued; their names are
    printed. The bases stay as they are, so after many new users a compression of all makes a smaller bundle.
    """  # noqa: D301
    made, rows, queued = Bundle.load(bundle), [], []
    read = reader(base)
    for user, folder in named_folders(folders).items():
        found = project(made, user, read(folder), **limits)
        made = found.bundle
        rows.append((user, found.outcome, f"{found.error:.5f}", f"{found.added:,}"))
        queued += [user] if found.outcome == QUEUED else []
    bundle_id = made.save(out)
    table(("user", "outcome", "relative error", "bytes"), rows)
    _written(len(made.users), out, bundle_id)
    if queued:
        click.echo(f"queued       {', '.join(queued)}: not in the bundle; compress again with them", err=True)
        ctx.exit(QUEUED_EXIT)


@click.command("remove")
@BUNDLE
@click.argument("users", nargs=-1, required=True, metavar="USER...")
@OUT
def remove_command(bundle: Path, users: tuple[str, ...], *, out: Path) -> None:
    """Take USER... out of BUNDLE: their numbers are not in NEW.

    Where bases are shared, the users' adapters have shaped them, and they stay as they are. NEW says so, and
    `soppu inspect` shows it; only a compression without the users makes bases that have never seen them.
    """
    made = Bundle.load(bundle)
    for user in dict.fromkeys(users):
        made = forget(made, user)
    bundle_id = made.save(out)
    click.echo(f"removed      {', '.join(dict.fromkeys(users))}")
    if count := len(made.basis_saw):
        click.echo(
            f"bases saw    {count} adapter(s) that are gone; only a compression without them changes that"
        )
    _written(len(made.users), out, bundle_id)


@click.command("export")
@BUNDLE
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder to make; it must not be there yet.",
)
@click.option("--user", "users", multiple=True, help="Whom to export; repeatable. Default: everybody.")
@click.option(
    "--dtype",
    type=click.Choice(("float16", "bfloat16", "float32")),
    default="float16",
    show_default=True,
    help="Of the numbers written.",
)
@click.option(
    "--layers",
    type=click.IntRange(0),
    default=0,
    help="Decoder layers of the base model; default: from its folder, or else the highest in the bundle.",
)
@click.option(
    "--base-model",
    help="Name to write, as the server was started with it; default: the bundle's.",
)
def export_command(
    bundle: Path, *, out: Path, users: tuple[str, ...], dtype: str, layers: int, base_model: str | None
) -> None:
    """Write the users of BUNDLE as PEFT folders that LoRAX, PEFT and others load: DIR/USER.

    The folders keep to what LoRAX serves without a slow path or a silent failure: one rank of 8, 16, 32, 64
    and 128 for all of them, padded with zeros; lora_alpha = r; and the same projections on every decoder
    layer, with zeros where a user or a layer has none (LoRAX ignores a projection that one layer lacks). So
    they are larger than the adapters they came from. All folders are written, or none.
    """
    loaded = Bundle.load(bundle)
    layers = layers or _layers_of(loaded.base_model)
    with tqdm(desc="export", unit="user", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = export(
            loaded, out, users=users, dtype=dtype, layers=layers, base_model=base_model, progress=show
        )
    errors = loaded.report.relative_error
    rows = [(user, f"{errors[user]:.5f}", str(folder)) for user, folder in made.folders.items()]
    table(("user", "relative error", "folder"), rows)
    lost = [user for user in loaded.report.lost_users if user in made.folders]
    if lost:
        click.echo(f"lost users   {', '.join(lost)}: not in the bundle, zeros are written", err=True)
    click.echo(f"rank         {made.rank}, {made.modules} modules over {made.layers} layers, {dtype}")
    click.echo(f"on disk      {made.bytes:,} bytes, the bundle has {bundle.stat().st_size:,}")


def _layers_of(base_model: str) -> int:
    """How many decoder layers the base model has, 0 unless its folder is on this machine to say it."""
    if not base_model or not (Path(base_model) / "config.json").exists():
        return 0
    return models.layer_count(base_model)


def _written(users: int, out: Path, bundle_id: str) -> None:
    click.echo(f"bundle       {out}, {users} users, {out.stat().st_size:,} bytes\nid           {bundle_id}")
