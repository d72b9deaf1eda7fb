"""`soppu rollback`: put a server back on the bundle that was live before."""

from __future__ import annotations

import os
from pathlib import Path

import click

from soppu.commands.options import registry_options
from soppu.errors import RegistryError, TargetError
from soppu.registry import Registry
from soppu.serve import admin_token as tokens
from soppu.stages.publish import previous_bundles, refuse_forgotten, target_class


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
def rollback_command(url: str, state: Path, root: str, catalogue: str, bundle_id: str) -> None:
    """Make the bundle before the present one live again, and record that.

    The server keeps the bundle before; an older one is brought back from the registry. Going back a second
    time goes one further. A bundle with a user who was forgotten is never live again.
    """
    registry = Registry.open(root, catalogue=catalogue, create=False)
    with registry.publishing(url):  # between a publication's switch and its record, neither is ours to change
        here = [one for one in registry.publications() if one.url.rstrip("/") == url.rstrip("/")]
        kind = here[0].target if here else "embedded"
        token = os.environ.get(tokens.VARIABLE, "")
        target = target_class(kind)(url, admin_token=token, token_file=tokens.token_file(state))
        if not target.is_up():
            raise TargetError(f"{url}: nobody answers there")
        live = target.active()
        if not bundle_id:
            before = previous_bundles(registry, url, live)
            if not before:
                raise RegistryError(f"{url}: nothing but {live[:12] or 'no bundle'} was published there")
            bundle_id = before[0]
        refuse_forgotten(registry, bundle_id)
        target.publish(registry.bundle_path(bundle_id), bundle_id=bundle_id)
        target.activate(bundle_id)
        registry.record_publication(target=kind, url=target.url, bundle_id=bundle_id)
    click.echo(f"{url}: {live[:12] or 'no bundle'} -> {bundle_id[:12]}")
