"""Stage: all adapters of a set into one bundle."""

from __future__ import annotations

from soppu.compress import CompressOptions, compress
from soppu.stages.run import open_run


def compress_set(run_folder: str, set_id: str) -> str:
    """Compress a frozen set into a bundle, store it, and note its sizes; returns the bundle's id."""
    run = open_run(run_folder)
    registry = run.registry()
    members = registry.get_set(set_id)
    settings = run.config.compress
    bundle = compress(
        {user: registry.get_adapter(adapter_id) for user, adapter_id in members.items()},
        CompressOptions(
            method=settings.method,
            rank=settings.rank,
            max_steps=settings.max_steps,
            tolerance=settings.tolerance,
            dtype=settings.dtype,
            device=settings.device,
            seed=run.config.seed,
        ),
        adapter_ids=members,
    )
    bundle_id = registry.put_bundle(bundle.to_bytes(), set_id=set_id, run=run.id)
    report = bundle.report.to_dict()
    report["bytes_before"] = sum(registry.adapter_bytes(adapter_id) for adapter_id in members.values())
    report["bytes_after"] = registry.bundle_bytes(bundle_id)
    run.write(f"compression-{bundle_id[:16]}.json", report)
    return bundle_id
