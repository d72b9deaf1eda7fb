"""`soppu rollback`: put a server back on the bundle that was live before."""

from __future__ import annotations

import os

import click


@click.command("rollback")
@click.option("--url", default="http://127.0.0.1:8099", show_default=True, help="The server.")
@click.option(
    "--registry",
    "root",
    default=".soppu/registry",
    show_default=True,
    metavar="PATH/URL",
    help="Where publications are recorded.",
)
@click.option(
    "--catalogue", default="", metavar="URL", help="SQLAlchemy URL; default: SQLite inside the registry."
)
@click.option("--to", "bundle_id", default="", metavar="BUNDLE", help="Another bundle than the one before.")
def rollback_command(url: str, root: str, catalogue: str, bundle_id: str) -> None:
    """Make the bundle before the present one live again, and record that.

    The server keeps the bundle before; an older one is brought back from the registry.
    """
    from soppu.errors import RegistryError  # torch comes along with the registry: not for `soppu --help`
    from soppu.registry import Registry
    from soppu.targets.embedded import EmbeddedTarget

    registry = Registry.open(root, catalogue=catalogue, create=False)
    target = EmbeddedTarget(url, admin_token=os.environ.get("SOPPU_ADMIN_TOKEN", ""))
    live = target.active()
    if not bundle_id:
        here = [item for item in registry.publications() if item.url.rstrip("/") == url.rstrip("/")]
        before = [item.bundle_id for item in here if item.bundle_id != live]
        if not before:
            raise RegistryError(f"{url}: nothing but {live[:12] or 'no bundle'} was ever published there")
        bundle_id = before[0]
    target.publish(registry.bundle_path(bundle_id), bundle_id=bundle_id)
    target.activate(bundle_id)
    registry.record_publication(target="embedded", url=url, bundle_id=bundle_id)
    click.echo(f"{url}: {live[:12] or 'no bundle'} -> {bundle_id[:12]}")
