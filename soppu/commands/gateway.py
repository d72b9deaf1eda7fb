"""`soppu gateway`: one address where users reach their own models."""

from __future__ import annotations

from pathlib import Path

import click

from soppu.commands.options import key_values
from soppu.commands.until_told import log_to_stderr
from soppu.gateway import settings as gateway_settings
from soppu.gateway.server import run
from soppu.registry import Registry


@click.command("gateway")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file of settings; see docs/operate.md.",
)
@click.option(
    "--registry", "root", metavar="PATH/URL", help="registry.root: whose catalogue says who is served what."
)
@click.option("--catalogue", metavar="URL", help="registry.catalogue: a SQLAlchemy URL.")
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help='One setting, as limits.requests="5/second".'
)
def gateway_command(
    config: Path | None,
    *,
    root: str | None,
    catalogue: str | None,
    host: str | None,
    port: int | None,
    given: tuple[str, ...],
) -> None:
    """Serve users' own models, and nobody else's, to whoever shows a key or a signed token.

    What a request says of `model` or `adapter_id` may be the caller's own name or nothing; the gateway writes
    in what the catalogue has for them. Keys: `soppu keys`.
    """
    options = {"registry.root": root, "registry.catalogue": catalogue, "host": host, "port": port}
    named = {name: value for name, value in options.items() if value is not None}
    settings = gateway_settings.load(config, {**key_values(given), **named})
    place = settings.registry
    registry = Registry.open(place.root, catalogue=place.catalogue, create=place.create)
    try:
        log_to_stderr()
        run(registry, settings)
    finally:
        registry.close()
