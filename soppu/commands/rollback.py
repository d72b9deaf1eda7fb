"""`soppu rollback`: put a server back on the bundle that was live before."""

from __future__ import annotations

import os
from pathlib import Path

import click

from soppu.commands.options import registry_options
from soppu.errors import RegistryError, TargetError
from soppu.registry import Registry
from soppu.serve import admin_token as tokens
from soppu.stages.history import previous_bundles, refuse_forgotten
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import HttpTarget
from soppu.targets.lorax_volume import Volume
from soppu.targets.vllm import VllmTarget


@click.command("rollback")
@click.option("--url", default="http://127.0.0.1:8099", show_default=True, help="The server.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path(".soppu/serve"),
    show_default=True,
    help="The server's state folder, which holds its admin token unless SOPPU_ADMIN_TOKEN is set.",
)
@registry_options("Where publications are recorded.")
@click.option("--to", "bundle_id", default="", metavar="BUNDLE", help="Another bundle than the one before.")
@click.option("--volume", default="", help="Folder or S3 prefix that a LoRAX reads its adapters from.")
def rollback_command(
    url: str, *, state: Path, root: str, catalogue: str, bundle_id: str, volume: str
) -> None:
    """Make the bundle before the present one live again, and record that.

    The server keeps the bundle before; an older one is brought back from the registry, but for a LoRAX, to
    which the pipeline publishes it again. Going back a second time goes one further. A bundle with a user who
    was forgotten is never live again.
    """
    registry = Registry.open(root, catalogue=catalogue, create=False)
    with registry.publishing(url):  # between a publication's switch and its record, neither is ours to change
        here = registry.publications(url)
        kind, of_adapters = here[0].target if here else "embedded", bool(registry.placements(url))
        target = None if of_adapters else _taking_bundles(kind, url, state)
        live = target.active() if target else registry.live(url)
        if not bundle_id:
            before = previous_bundles(registry, url, live)
            if not before:
                raise RegistryError(f"{url}: nothing but {live[:12] or 'no bundle'} was published there")
            bundle_id = before[0]
        refuse_forgotten(registry, bundle_id)
        placements: dict[str, str] = {}
        if target:
            target.publish(registry.bundle_path(bundle_id), bundle_id=bundle_id)
            target.activate(bundle_id)
        elif volume:
            placements = Volume.open(volume).placements(bundle_id)
        else:
            raise TargetError(f"{url}: a LoRAX; --volume says which folder or S3 prefix it reads")
        registry.record_publication(
            target=kind, url=url.rstrip("/"), bundle_id=bundle_id, placements=placements
        )
    click.echo(f"{url}: {live[:12] or 'no bundle'} -> {bundle_id[:12]}")


def _taking_bundles(kind: str, url: str, state: Path) -> HttpTarget:
    """A server with our admin routes, which answers. TargetError if none does."""
    server = VllmTarget if kind == "vllm" else EmbeddedTarget
    token = os.environ.get(tokens.VARIABLE, "")
    target = server(url, admin_token=token, token_file=tokens.token_file(state))
    if not target.is_up():
        raise TargetError(f"{url}: nobody answers there")
    return target
