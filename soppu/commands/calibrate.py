"""`soppu calibrate`: second moments of a base model's layer inputs, one file, for whitened compression."""

from __future__ import annotations

from pathlib import Path

import click
from torch import Tensor
from tqdm import tqdm

from soppu import calibrate, data, models, tables
from soppu.commands.options import CACHE
from soppu.compress.linalg import whitening


@click.command("calibrate")
@click.argument("model")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File of moments to write."
)
@click.option(
    "--source",
    default="stdlib-public",
    show_default=True,
    help="Public text: stdlib-public, or a file or folder of any layout in docs/data.md.",
)
@click.option(
    "--examples", type=click.IntRange(1), default=32, show_default=True, help="Texts to read, at most."
)
@click.option(
    "--max-tokens", type=click.IntRange(16), default=256, show_default=True, help="Tokens of a text, at most."
)
@click.option(
    "--modules",
    multiple=True,
    metavar="PATTERN",
    help="Layers, by name or regular expression; repeatable. All but the output head, if none is given.",
)
@click.option(
    "--about",
    type=click.Choice(["mean", "zero"]),
    default="mean",
    show_default=True,
    help="Moments about the mean input, or about zero.",
)
@CACHE
def calibrate_command(
    model: str,
    *,
    out: Path,
    source: str,
    examples: int,
    max_tokens: int,
    modules: tuple[str, ...],
    about: str,
    cache: Path,
) -> None:
    """Measure what the layers of MODEL get as input, so that compression can spare what they use.

    MODEL (an alias such as smollm2-135m, a folder or a hub id) reads public text once, without any adapter.
    For each layer the file keeps C, the second moments of its input of i features. An error E in what an
    adapter adds then costs tr(E C E^T) at the output, which compression can minimise in place of the plain
    norm, at the same bytes. One file serves all users of the base model; bundles and servers do not need it.

    Moments about the mean leave out what an adapter adds to every token alike, and the first token of a text,
    which decoders treat as no other: both can outweigh all the rest, and spoil the choice of what to keep.

    \b
    A PATTERN fits a whole name, or its end after a dot:
      --modules q_proj --modules down_proj        these projections in every layer
      --modules 'model.layers.2[6-9].*'           all projections of layers 26 to 29

    Name the modules that your adapters change: each different input takes 8 i^2 bytes of memory while it runs
    and 2 i^2 bytes in the file. The table shows, for each, how many of its i directions are in use: the
    participation ratio (tr C)^2 / ||C||^2, from 1 to i. The further it is below i, the more there is to gain.
    """  # noqa: D301
    centred = about == "mean"
    base = models.resolve(model, cache=cache)
    network = models.load_model(base)
    chosen = calibrate.select(calibrate.linear_names(network), modules)
    texts = data.load_public(source, limit=examples)
    blocks = data.tokenize(texts, models.load_tokenizer(base), max_tokens=max_tokens)
    tokens = sum(len(block.ids) for block in blocks)
    with tqdm(desc="calibrate", total=len(blocks), unit="text", disable=None) as bar:
        moments = calibrate.second_moments(
            network, blocks, chosen, centred=centred, progress=lambda done, _: bar.update(done - bar.n)
        )
    calibrate.save(
        moments,
        out,
        base_hash=base.hash,
        base_model=base.name,
        examples=len(blocks),
        tokens=tokens,
        centred=centred,
    )
    _table(moments)
    click.echo(f"text         {len(blocks)} examples, {tokens:,} tokens of {source}")
    click.echo(f"base model   {base.name} {base.hash[:12]}")
    click.echo(f"moments      {out}, {out.stat().st_size:,} bytes")


def _table(moments: dict[str, Tensor]) -> None:
    groups: dict[int, list[str]] = {}
    for name, C in moments.items():
        groups.setdefault(id(C), []).append(name)
    rows = []
    for name, *others in groups.values():
        used, leaves = whitening.participation(moments[name]), (other.rpartition(".")[2] for other in others)
        rows.append((name, str(len(moments[name])), f"{used:.1f}", ", ".join(leaves)))
    heads = ("module", "features", "in use", "shared by")
    click.echo(tables.render(heads, rows, right=(1, 2), width=tables.terminal_width()))
    click.echo()
