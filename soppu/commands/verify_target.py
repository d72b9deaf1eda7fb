"""`soppu verify-target`: try a running LoRAX, vLLM or embedded server, point by point."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from soppu import files, tables
from soppu.commands.options import CACHE, named_folders
from soppu.compress import Bundle
from soppu.targets import verify, verify_reference
from soppu.targets.lorax_volume import Volume
from soppu.targets.verify import Subject, Trial
from soppu.targets.verify_reference import Reference
from soppu.targets.verify_server import KINDS, Server


@click.command("verify-target")
@click.argument("url")
@click.option(
    "--bundle", type=click.Path(dir_okay=False, path_type=Path), help="Bundle that the server has to serve."
)
@click.option(
    "--adapters",
    multiple=True,
    metavar="DIR",
    help="PEFT folders it has to serve: DIR, USER=DIR, or one folder that holds many; repeatable.",
)
@click.option(
    "--user", "--users", "users", multiple=True, help="Whom to try; repeatable. Default: everybody."
)
@click.option("--token", default="", envvar="SOPPU_TOKEN", help="Sent as a bearer token with every request.")
@click.option(
    "--kind", type=click.Choice(("auto", *KINDS)), default="auto", show_default=True, help="What it is."
)
@click.option(
    "--volume",
    metavar="DIR/URL",
    default="",
    help="What a LoRAX reads: the folder that is /data there, or s3://bucket/prefix.",
)
@click.option(
    "--model", default="", help="Base model, as `soppu serve` takes it: answers are compared with its own."
)
@CACHE
@click.option("--prompt", default="The quick brown fox", show_default=True, help="What every user is asked.")
@click.option(
    "--tokens", type=click.IntRange(1), default=8, show_default=True, help="Tokens of every answer."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="How far logprobs may be off: rounding in 16 bits.",
)
@click.option(
    "--within",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds an answer may take; the first one of an adapter loads it.",
)
@click.option("--dangerous", is_flag=True, help="Also try requests that end a bare LoRAX.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify_target_command(
    ctx: click.Context,
    /,
    *,
    url: str,
    bundle: Path | None,
    adapters: tuple[str, ...],
    users: tuple[str, ...],
    token: str,
    kind: str,
    volume: str,
    model: str,
    cache: Path,
    within: float,
    as_json: bool,
    **how: Any,
) -> None:
    """Try every point that the server at URL can get wrong with users' adapters; pass or fail for each.

    A LoRAX answers with the base model, and HTTP 200, where it does not understand an adapter; so every user
    is asked, and with --model the answer is compared with what base model and adapter give on this machine.

    \b
    soppu verify-target http://gpu:8080 --bundle users.soppu --volume /srv/lorax --model org/base
    soppu verify-target http://gpu:8000 --kind vllm --adapters exported/

    A bare LoRAX knows no users: it is asked for the paths that the bundle has in --volume, or for those of
    the folders below it; without --volume for the folders' absolute paths. The exit code is 0 only if nothing
    failed. A point that could not be tried says what was missing, and does not fail.
    """  # noqa: D301
    if bool(bundle) == bool(adapters):
        raise click.UsageError("give --bundle FILE or --adapters DIR, one of the two")
    place = Volume.open(volume) if volume else None
    source = place.source if place is not None else ""
    server = Server.find(url, kind=kind, token=token, source=source, within=within)
    if bundle is not None:
        subjects = _of_bundle(bundle, server, place, Path(volume))
    else:
        subjects = _of_folders(adapters, server, volume)
    if missing := set(users) - {one.user for one in subjects}:
        raise click.BadParameter(f"{', '.join(sorted(missing))}: not among the {len(subjects)} users", ctx)
    trial = Trial(
        server,
        [one for one in subjects if not users or one.user in users],
        Reference.load(model, cache=cache) if model else None,
        **how,
    )
    with tqdm(
        desc="verify", unit="user", total=len(trial.subjects), disable=True if as_json else None
    ) as bar:
        points = verify.verify(trial, progress=lambda done, _: bar.update(done - bar.n) and None)
    _print_json(points, server) if as_json else _print(points, server)
    ctx.exit(any(point.verdict == "fail" for point in points))


def _print_json(points: list[verify.Point], server: Server) -> None:
    told = {"url": server.url, "kind": server.kind, "model_id": server.model_id}
    shown = [asdict(point) for point in points]
    failed = [point.name for point in points if point.verdict == "fail"]
    click.echo(json.dumps({**told, "points": shown, "failed": failed}, indent=2))


def _of_bundle(bundle: Path, server: Server, place: Volume | None, root: Path) -> list[Subject]:
    """The users of a bundle, under the ids this server knows them by."""
    loaded, bundle_id = Bundle.load(bundle), files.sha256_file(bundle)
    if place is not None:
        ids = place.placements(bundle_id)
        folders = {user: root / path for user, path in ids.items()} if place.source == "local" else {}
    elif server.kind == "lorax":
        raise click.UsageError(
            "a LoRAX knows no users: give --volume, which says where the bundle's users lie"
        )
    else:
        version = f"@{bundle_id}" if server.has_versions else ""
        ids, folders = {user: f"{user}{version}" for user in loaded.users}, {}
    return [
        Subject(user, ids[user], folders.get(user), partial(loaded.reconstruct, user))
        for user in loaded.users
        if user in ids
    ]


def _of_folders(adapters: tuple[str, ...], server: Server, volume: str) -> list[Subject]:
    """The users of PEFT folders: by name, or for a LoRAX by where the folders lie."""
    subjects = []
    for user, folder in named_folders(adapters).items():
        adapter_id = user
        if server.source:
            adapter_id = str(folder.resolve())
            if volume:
                try:
                    adapter_id = str(folder.resolve().relative_to(Path(volume).resolve()))
                except ValueError:
                    raise click.BadParameter(f"{folder} is not below the volume {volume}") from None
        subjects.append(Subject(user, adapter_id, folder, partial(verify_reference.read, folder)))
    return subjects


def _print(points: list[verify.Point], server: Server) -> None:
    rows = [(point.name, point.verdict, point.detail or verify.POINTS[point.name]) for point in points]
    width = tables.terminal_width()
    click.echo(tables.render(("point", "verdict", "detail"), rows, right=(), width=width))
    counts = {word: sum(point.verdict == word for point in points) for word in ("pass", "fail")}
    rest = len(points) - sum(counts.values())
    click.echo(
        f"\n{server.kind} at {server.url}, {server.model_id}:"
        f" {counts['pass']} passed, {counts['fail']} failed, {rest} not applicable"
    )
