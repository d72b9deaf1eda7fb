"""Publishes a bundle file to a running server, as the pipeline's stage does; may be killed at any moment."""

from __future__ import annotations

from pathlib import Path

from soppu.compress.bundle.bundle import Bundle
from soppu.files import sha256_file
from soppu.registry import Registry
from soppu.targets.embedded import EmbeddedTarget


def publish(root: Path, url: str, token: str, path: Path) -> None:
    """Stage, ask once for every user, switch, note."""
    registry = Registry.open(root, create=False)
    target = EmbeddedTarget(url, admin_token=token)
    bundle_id = sha256_file(path)
    bundle = Bundle.load(path, expected_hash=bundle_id)
    with registry.publishing(url):
        target.publish(path, bundle_id=bundle_id)
        faults = target.canary(bundle.users, "the quick", bundle_id=bundle_id, workers=8)
        if failed := [f"{user}: {why}" for user, why in zip(bundle.users, faults, strict=True) if why]:
            raise SystemExit("; ".join(failed))
        target.activate(bundle_id)
        registry.record_publication(target="embedded", url=url, bundle_id=bundle_id)
