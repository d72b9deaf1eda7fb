"""`soppu compress`: PEFT folders into one bundle file. Not for the catalogue: it looks at no registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from torch import Tensor
from tqdm import tqdm

from soppu import calibrate
from soppu.adapter import WEIGHTS_FILE, AdaptersOnDemand, LoraAdapter
from soppu.base_identity import Base
from soppu.commands.describe import summary, table
from soppu.commands.options import BASE, OUT, named_folders, reader
from soppu.compress import CompressOptions, compress
from soppu.config import METHODS, TARGETS, CompressSettings
from soppu.errors import BundleError

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FIELDS = CompressSettings.__pydantic_fields__  # type: ignore[attr-defined]


def _settings(*names: str) -> Callable[[_Command], _Command]:
    """Options with the types, defaults and texts of the settings they are named after."""

    def decorate(command: _Command) -> _Command:
        for name in reversed(names):
            field = _FIELDS[name]
            text = next(item for item in field.metadata if isinstance(item, str))
            kind = click.Choice(METHODS) if name == "method" else type(field.default)
            flag = {"is_flag": True} if kind is bool else {"type": kind, "show_default": name not in TARGETS}
            option = click.option(f"--{name.replace('_', '-')}", default=field.default, help=text, **flag)
            command = option(command)
        return command

    return decorate


@click.command("compress")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@OUT
@_settings("method", "ratio", "max_bytes", "max_error", "rank", "clusters", "basis_bits", "core_bits")
@_settings("density", "alpha", "faithful")
@click.option(
    "--moments",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of `soppu calibrate`: weigh errors by what they do to the output.",
)
@BASE
@click.option("--seed", type=int, default=0, show_default=True, help="Of sketches and cluster starts.")
@_settings("device")
def compress_command(
    folders: tuple[str, ...], *, out: Path, moments: Path | None, base: str, **settings: Any
) -> None:
    """Compress the PEFT adapters in DIR... into one bundle.

    Every folder is one user's adapter, named after the folder; USER=DIR gives another name. A folder that is
    no adapter itself stands for all adapter folders in it. Adapters are read as they are needed, several
    times, so any number of them fits into memory.

    \b
    What it has to reach is one target:
      --ratio 16         a size: 16 times below 16 bits a number. The default, for residual and svd
      --max-bytes 500000 a size: this many bytes
      --max-error 0.3    a quality: the smallest file in which no user's relative error is above 0.3

    \b
    How it gets there is a method:
      residual    the default; fits any adapters: a shared basis as far as it pays, numbers of a user's own
                  where it does not. Never much worse than svd, far smaller where users are alike
      svd         each adapter by itself, mixed widths. For few or unrelated adapters; nothing is shared, so
                  nothing of a user stays when the user goes
      joint       a full core for every user in one basis: the cheapest to serve, for many users who are alike
      joint-diag  a diagonal core: smallest of all for a user, and least exact. No --max-error
      cluster     joint with several bases, for users who fall into groups: --clusters
      ternary     ComPEFT, signs and a scale: to compare with. No --max-error

    Without a target the joint methods keep --rank and ternary --density. Take a ratio first, look at the
    errors in the table, and ask for --max-error if every user has to be good.

    The table shows every user's relative error as stored, and the bytes of the weights file.
    """  # noqa: D301
    options = CompressOptions(**settings)
    options.torch_device()
    named = named_folders(folders)
    adapters = AdaptersOnDemand(named, reader(base))
    weighed = _moments(moments, adapters) if moments else None
    with tqdm(desc="reading", total=len(named), unit="user", disable=None) as bar:

        def show(what: str, done: int, total: int) -> None:
            if done <= bar.n:  # another pass over the users
                bar.reset(total)
            bar.set_description_str(what, refresh=False)
            bar.update(done - bar.n)

        bundle = compress(adapters, options, moments=weighed, progress=show)
    bundle_id = bundle.save(out)
    before = {user: (folder / WEIGHTS_FILE).stat().st_size for user, folder in named.items()}
    errors, total, after = bundle.report.relative_error, sum(before.values()), out.stat().st_size
    rows = [(user, f"{errors[user]:.5f}", f"{before[user]:,}") for user in bundle.users]
    table(("user", "relative error", "bytes before"), rows)
    summary(bundle, after)
    click.echo(f"on disk      {total:,} -> {after:,} bytes ({total / after:.2f}x)")
    click.echo(f"bundle       {out}\nid           {bundle_id}")
    if not bundle.base_hash:
        named_as = f"by the name {bundle.base_model!r} alone" if bundle.base_model else "not at all"
        click.echo(f"base model   known {named_as}; --base MODEL writes its hash", err=True)


def _moments(path: Path, adapters: Mapping[str, LoraAdapter]) -> dict[str, Tensor]:
    """Second moments of every module that somebody adapts, of the base model that the adapters name."""
    widths: dict[str, int] = {}
    base = Base()
    for adapter in adapters.values():
        base = base.joined(adapter.base)
        widths |= {name: int(pair.A.shape[1]) for name, pair in adapter.pairs.items()}
    found = calibrate.load(path, base_hash=base.hash, base_model=base.name, modules=sorted(widths))
    if not base.hash:
        click.echo(
            f"{path}: the folders do not say which base model they are for but by name; names and widths fit",
            err=True,
        )
    for name, i in widths.items():
        if found[name].shape[0] != i:
            raise BundleError(
                f"{path}: {name}: moments of {found[name].shape[0]} features, the adapters have {i}"
            )
    return found
