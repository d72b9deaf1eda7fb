"""Stage: push a bundle that passed the gate to the serving target, try every user, switch over."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.evaluate.gate import Verdict
from soppu.evaluate.report import Serving
from soppu.stages.run import Run, open_run
from soppu.targets.embedded import EmbeddedTarget, ServerLaunch

SERVING = "serving.json"


def publish(run_folder: str, bundle_id: str, evaluation: str) -> str:
    """Publish a bundle; returns the URL it is served at.

    Staged first, asked one canary a user, switched to only when all of them answered. Until then, and if
    anything fails, what was published before goes on being served.

    Raises:
        GateError: the evaluation's verdict was no; carries every reason.
        TargetError: the server refused, is not there, or a canary failed.
    """
    run = open_run(run_folder)
    Verdict.from_dict(run.read(evaluation)["verdict"]).raise_if_refused()
    registry, settings = run.registry(), run.config.serve
    target = open_target(run)
    path = registry.bundle_path(bundle_id)
    bundle = Bundle.load(path, expected_hash=bundle_id)
    before = target.active()
    target.publish(path, bundle_id=bundle_id)
    canaries = target.canary(
        bundle.users,
        settings.canary_prompt,
        bundle_id=bundle_id,
        zero_users=_without_change(bundle),
        max_new_tokens=settings.canary_tokens,
        workers=settings.max_batch,
    )
    failed = [f"{item.user}: {item.reason}" for item in canaries if not item.ok]
    if failed:
        if bundle_id != before:
            target.drop(bundle_id)
        raise TargetError(f"bundle {bundle_id[:12]} stays unpublished, canaries failed: {'; '.join(failed)}")
    target.activate(bundle_id)
    _drop_others(target, keep={bundle_id, before})
    registry.record_publication(target=settings.target, url=settings.url, bundle_id=bundle_id)
    serving = Serving(
        target=settings.target,
        url=settings.url,
        bundle_id=bundle_id,
        canaries={item.user: item.reason for item in canaries},
        prompt=settings.canary_prompt,
        completions={
            user: target.complete(
                settings.canary_prompt, user=user, max_new_tokens=settings.completion_tokens
            )
            for user in bundle.users
        },
    )
    run.write(SERVING, dataclasses.asdict(serving))
    return settings.url


def open_target(run: Run) -> EmbeddedTarget:
    """The serving target of a run's configuration; the embedded server is started if nobody answers."""
    settings = run.config.serve
    base = run.base()
    target = EmbeddedTarget(
        settings.url, base_hash=base.hash, admin_token=os.environ.get("SOPPU_ADMIN_TOKEN", "")
    )
    state = Path(settings.state)
    target.start(
        ServerLaunch(
            model=run.config.base.model,
            cache=Path(run.config.base.cache),
            state=state,
            log=state / "server.log",
            pid_file=state / "server.pid",
            max_batch=settings.max_batch,
            timeout=settings.start_timeout_s,
        )
    )
    return target


def _drop_others(target: EmbeddedTarget, *, keep: set[str]) -> None:
    """Leave the server the bundle that is live and the one before it, for a rollback."""
    for bundle_id in set(target.bundles()) - keep:
        target.drop(bundle_id)


def _without_change(bundle: Bundle) -> set[str]:
    """Users whose cores are zero everywhere: for them the base model's answer is the right one."""
    return {
        user
        for number, user in enumerate(bundle.users)
        if all(float(module.norm[number]) == 0.0 for module in bundle.modules.values())
    }
