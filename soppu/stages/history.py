"""What was live at a server before: what may be gone back to, what is kept, what must never be live again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from soppu.config import TargetConfig
from soppu.errors import TargetError
from soppu.registry import Registry


def refuse_forgotten(registry: Registry, bundle_id: str) -> None:
    """TargetError if a user of this bundle has been forgotten: it must not go live, not even again."""
    if registry.bundle(bundle_id).contains_forgotten:
        raise TargetError(
            f"bundle {bundle_id[:12]} holds a user who was forgotten; compress again without them"
        )


def previous_bundles(registry: Registry, url: str, bundle_id: str) -> list[str]:
    """Bundles that a server could go back to from this one, the best choice first.

    Those that were live before this one first was, newest first; then whatever else was ever live there.
    """
    here = [item.bundle_id for item in registry.publications(url)]
    first = len(here) - 1 - here[::-1].index(bundle_id) if bundle_id in here else -1
    others = dict.fromkeys(item for item in [*here[first + 1 :], *here] if item != bundle_id)
    return [item for item in others if not registry.bundle(item).contains_forgotten]


def kept(registry: Registry, settings: TargetConfig, bundle_id: str) -> set[str]:
    """Bundles that a server keeps: the live one, the one before it for a rollback, and those still draining.

    A server that takes bundles ends what is under way by itself. Of one that takes adapters, who resolved a
    user a moment ago still asks for what was live then, for at most `drain_s` seconds.
    """
    before = set(previous_bundles(registry, settings.url, bundle_id)[:1])
    if not settings.pushes_adapters:
        return {bundle_id, *before}
    since = (datetime.now(UTC) - timedelta(seconds=settings.drain_s)).isoformat(timespec="microseconds")
    here = registry.publications(settings.url)
    # newest first: each was live until the one before it in this list was recorded
    draining = {old.bundle_id for new, old in zip(here, here[1:], strict=False) if new.at > since}
    return {bundle_id, *before, *draining}
