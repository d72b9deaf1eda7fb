"""`soppu serve`: the embedded server from the command line."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from soppu.commands.options import CACHE, HOST
from soppu.commands.until_told import log_to_stderr
from soppu.serve import admin_token as tokens
from soppu.serve.engine.engine import EngineOptions
from soppu.serve.names import LOCAL
from soppu.serve.router.deciding import MODES, SPLITS, RouterOptions
from soppu.serve.router.policies import FITTED
from soppu.serve.server import ServeOptions, run

_LIMITS = (
    "max_batch",
    "max_queue",
    "max_input_tokens",
    "max_total_tokens",
    "max_batch_total_tokens",
    "prefix_tokens",
    "max_best_of",
)


def _adapter(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for value in values:
        name, equals, folder = value.rpartition("=")
        if not name or not equals or not folder:
            raise click.BadParameter(f"{value!r} is not NAME=DIR")
        pairs.append((name, Path(folder)))
    return tuple(pairs)


def _local(_: click.Context, __: click.Parameter, value: str) -> str:
    if value.lower() != LOCAL:
        raise click.BadParameter(f"{value!r}, allowed: {LOCAL!r}; this server fetches no adapters")
    return value


def _limits(given: dict[str, Any]) -> EngineOptions:
    """The engine's options, taken out of those of the command."""
    limits: dict[str, int] = {name: given.pop(name) for name in _LIMITS}
    if together := given.pop("concurrent"):
        limits["max_batch"] = min(limits["max_batch"], together - 1)
        limits["max_queue"] = together - limits["max_batch"]
    if (best := limits["max_best_of"]) > (most := max(limits["max_queue"], EngineOptions.max_best_of)):
        raise click.BadParameter(
            f"{best}, allowed: up to {most}; all texts of a request have to find room to wait"
            " (--max-waiting)",
            param_hint="--max-best-of",
        )
    return EngineOptions(**limits)


def _router(given: dict[str, Any]) -> RouterOptions:
    """The router's options, taken out of those of the command."""
    names = [item.name for item in fields(RouterOptions)]
    return RouterOptions(**{name: given.pop(f"router_{name}") for name in names})


@click.command("serve")
@click.option(
    "--model",
    envvar="MODEL_ID",
    default="smollm2-135m",
    show_default=True,
    help="Alias, folder or hub id of the base.",
)
@CACHE
@HOST
@click.option(
    "--port",
    envvar="PORT",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path(".soppu/serve"),
    show_default=True,
    help="Folder that remembers what is served.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Bundle file to serve at once.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    callback=_adapter,
    help="PEFT folder to serve under a name of its own; repeatable.",
)
@click.option(
    "--adapters",
    "mount",
    envvar="HUGGINGFACE_HUB_CACHE",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of PEFT folders that requests name by their path below it, as LoRAX's source local does.",
)
@click.option(
    "--max-active-adapters",
    envvar="MAX_ACTIVE_ADAPTERS",
    type=click.IntRange(1),
    default=ServeOptions.max_active_adapters,
    show_default=True,
    help="Adapters of --adapters in memory, beside those that running requests are on.",
)
@click.option(
    "--resident-mib",
    envvar="SOPPU_RESIDENT_MIB",
    type=click.IntRange(0),
    default=ServeOptions.resident_mib,
    show_default=True,
    help="MiB that users of bundles may take in memory, beside those that running requests are on; the others"
    " are read from the bundle when they ask.",
)
@click.option(
    "--read-ahead/--no-read-ahead",
    envvar="SOPPU_READ_AHEAD",
    default=ServeOptions.read_ahead,
    show_default=True,
    help="Read as many users of bundles as --resident-mib has room for before they ask, a little at a time.",
)
@click.option(
    "--default-adapter-source",
    envvar="DEFAULT_ADAPTER_SOURCE",
    default=LOCAL,
    show_default=True,
    callback=_local,
    expose_value=False,
    help="Only local: this server fetches no adapters.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="Of the weights; auto measures which of float32 and bfloat16 is faster here.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="torch threads; 0 is torch's choice.",
)
@click.option(
    "--max-batch", type=click.IntRange(1), default=32, show_default=True, help="Requests decoded together."
)
@click.option(
    "--max-waiting",
    "max_queue",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Requests that may wait beside those; one more is refused with 429.",
)
@click.option(
    "--max-concurrent-requests",
    "concurrent",
    envvar="MAX_CONCURRENT_REQUESTS",
    type=click.IntRange(2),
    help="Both together, in the place of --max-waiting.",
)
@click.option(
    "--max-input-tokens",
    envvar="MAX_INPUT_LENGTH",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Of one prompt.",
)
@click.option(
    "--max-total-tokens",
    envvar="MAX_TOTAL_TOKENS",
    type=click.IntRange(0),
    default=2048,
    show_default=True,
    help="Of one prompt and its answer; the model may allow less.",
)
@click.option(
    "--max-batch-total-tokens",
    envvar="MAX_BATCH_TOTAL_TOKENS",
    type=click.IntRange(0),
    default=EngineOptions.max_batch_total_tokens,
    show_default=True,
    help="Whose keys and values are kept at once; a request waits until all that it may need has room. 0:"
    " --max-batch times --max-total-tokens, in at most half of the free memory.",
)
@click.option(
    "--prefix-tokens",
    type=click.IntRange(0),
    default=EngineOptions.prefix_tokens,
    show_default=True,
    help="Of those, how many may stay for later requests whose prompts begin alike; 0 shares no prompts.",
)
@click.option(
    "--max-best-of",
    envvar="MAX_BEST_OF",
    type=click.IntRange(1),
    default=EngineOptions.max_best_of,
    show_default=True,
    help="Texts that one request may have generated to get the likeliest.",
)
@click.option(
    "--router",
    "router_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What `soppu router fit` wrote for this base model and bundle; read unless the mode is off.",
)
@click.option(
    "--router-mode",
    type=click.Choice(MODES),
    default=RouterOptions.mode,
    show_default=True,
    help="shadow logs and counts what it would do, ab routes a share, on routes whatever names a user.",
)
@click.option(
    "--router-policy",
    default="",
    help=f"Of {', '.join(FITTED)}.  [default: the file's own]",
)
@click.option(
    "--router-share",
    type=click.FloatRange(0, 1),
    default=RouterOptions.share,
    show_default=True,
    help="With ab, the share that is routed.",
)
@click.option(
    "--router-split",
    type=click.Choice(SPLITS),
    default=RouterOptions.split,
    show_default=True,
    help="With ab, what is drawn by hash: whole users, or requests.",
)
@click.option(
    "--router-seed", type=int, default=RouterOptions.seed, show_default=True, help="With ab, of the draw."
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds that requests under way get when the server is told to stop.",
)
def serve_command(**given: Any) -> None:
    """Serve a base model with every user's adapter, over LoRAX's HTTP API.

    Options of LoRAX's launcher are taken from its environment names too, so that one image takes the place
    of the other: MODEL_ID, PORT, HUGGINGFACE_HUB_CACHE, MAX_ACTIVE_ADAPTERS, DEFAULT_ADAPTER_SOURCE,
    MAX_CONCURRENT_REQUESTS, MAX_INPUT_LENGTH, MAX_TOTAL_TOKENS, MAX_BATCH_TOTAL_TOKENS, MAX_BEST_OF.

    The routes under /soppu/v1 ask for a bearer token: that of SOPPU_ADMIN_TOKEN, else one that the server
    makes at its first start and keeps in the file admin-token of its state folder.
    """
    log_to_stderr()
    limits, router = _limits(given), _router(given)
    run(ServeOptions(**given, engine=limits, router=router, admin_token=os.environ.get(tokens.VARIABLE, "")))
