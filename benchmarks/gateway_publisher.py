"""Publishes one bundle file to a running server, in the order of the pipeline's stage; killed at any moment.

python -m benchmarks.gateway_publisher REGISTRY URL FILE BUNDLE_ID
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from soppu.compress.bundle.bundle import Bundle
from soppu.registry import Registry
from soppu.targets.embedded import EmbeddedTarget


def main() -> None:
    """Stage, ask once for every user, switch, note."""
    root, url, path, bundle_id = sys.argv[1:]
    registry = Registry.open(root, create=False)
    target = EmbeddedTarget(url, admin_token=os.environ["SOPPU_ADMIN_TOKEN"])
    bundle = Bundle.load(Path(path), expected_hash=bundle_id)
    with registry.publishing(url):
        target.publish(Path(path), bundle_id=bundle_id)
        faults = target.canary(bundle.users, "the quick", bundle_id=bundle_id, workers=8)
        if failed := [f"{user}: {why}" for user, why in zip(bundle.users, faults, strict=True) if why]:
            raise SystemExit("; ".join(failed))
        target.activate(bundle_id)
        registry.record_publication(target="embedded", url=url, bundle_id=bundle_id)


if __name__ == "__main__":
    main()
