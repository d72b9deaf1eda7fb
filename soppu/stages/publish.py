"""Stage: push a bundle that passed the gate to the serving target, try every user, switch over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.evaluate.gate import Verdict
from soppu.registry import Registry
from soppu.serve import admin_token as tokens
from soppu.serve.bank.from_bundle import unchanged
from soppu.stages.run import Run, open_run
from soppu.targets.embedded import EmbeddedTarget, ServerLaunch
from soppu.targets.http import HttpTarget
from soppu.targets.vllm import VllmLaunch, VllmTarget

TARGETS: dict[str, type[HttpTarget]] = {"embedded": EmbeddedTarget, "vllm": VllmTarget}
SERVING = "serving.json"
SAMPLES = 64  # users whose sample completion goes into the report


def publish(run_folder: str, bundle_id: str, evaluation: str) -> str:
    """Publish a bundle; returns the URL it is served at.

    Staged first, asked one canary a user, switched to only when all of them answered. Until then, and if
    anything fails, what was published before goes on being served. One publication at a time.

    Raises:
        GateError: the evaluation's verdict was no; carries every reason.
        TargetError: the server refused, is not there, a canary failed, or a user of the bundle has been
            forgotten meanwhile.
    """
    run = open_run(run_folder)
    Verdict.from_dict(run.read(evaluation)["verdict"]).raise_if_refused()
    with run.registry().publishing(run.config.serve.url):
        return _publish(run, bundle_id)


def _publish(run: Run, bundle_id: str) -> str:
    registry, settings = run.registry(), run.config.serve
    refuse_forgotten(registry, bundle_id)
    path = registry.bundle_path(bundle_id)
    target = open_target(run, first=path)
    bundle = Bundle.load(path, expected_hash=bundle_id)
    target.publish(path, bundle_id=bundle_id)
    try:
        canaries = _ask_canaries(run, target, bundle, bundle_id)
        refuse_forgotten(registry, bundle_id)
    except TargetError:
        if bundle_id != target.active():
            target.drop(bundle_id)
        raise
    target.activate(bundle_id)
    registry.record_publication(target=settings.target, url=settings.url, bundle_id=bundle_id)
    kept = {bundle_id, *previous_bundles(registry, settings.url, bundle_id)[:1]}  # the other for a rollback
    for other in set(target.bundles()) - kept:
        target.drop(other)
    serving = {
        "target": settings.target,
        "url": settings.url,
        "bundle_id": bundle_id,
        "canaries": canaries,
        "prompt": settings.canary_prompt,
        "completions": {},
    }
    run.write(SERVING, serving)
    completions = {
        user: target.complete(settings.canary_prompt, user=user, max_new_tokens=settings.completion_tokens)
        for user in bundle.users[:SAMPLES]
    }
    run.write(SERVING, serving | {"completions": completions})
    return settings.url


def _ask_canaries(run: Run, target: HttpTarget, bundle: Bundle, bundle_id: str) -> dict[str, str]:
    """One answer with every user's adapter in the staged bundle; user -> "". TargetError names who failed."""
    settings = run.config.serve
    faults = target.canary(
        bundle.users,
        settings.canary_prompt,
        bundle_id=bundle_id,
        zero_users=unchanged(bundle),
        max_new_tokens=settings.canary_tokens,
        workers=settings.max_batch,
    )
    if failed := [f"{user}: {why}" for user, why in zip(bundle.users, faults, strict=True) if why]:
        raise TargetError(f"bundle {bundle_id[:12]} stays unpublished, canaries failed: {'; '.join(failed)}")
    return dict.fromkeys(bundle.users, "")


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
    here = [item.bundle_id for item in registry.publications() if item.url.rstrip("/") == url.rstrip("/")]
    first = len(here) - 1 - here[::-1].index(bundle_id) if bundle_id in here else -1
    others = dict.fromkeys(item for item in [*here[first + 1 :], *here] if item != bundle_id)
    return [item for item in others if not registry.bundle(item).contains_forgotten]


def target_class(kind: str) -> type[HttpTarget]:
    """What pushes to a kind of server, as publications name it. TargetError names the kinds there are."""
    if kind not in TARGETS:
        raise TargetError(f"serving target {kind!r}: allowed are {', '.join(TARGETS)}")
    return TARGETS[kind]


def open_target(run: Run, *, first: Path | None = None) -> HttpTarget:
    """The serving target of a run's configuration; its server is started if nobody answers.

    Args:
        first: the bundle a vLLM server is started with; it is not active there before it is switched to.

    Raises:
        TargetError: the server did not come up, or serves another base model; or a vLLM server has to be
            started and there is no bundle to start it with.
    """
    settings, state = run.config.serve, Path(run.config.serve.state)
    base = run.base()
    known: dict[str, Any] = {
        "base_hash": base.hash,
        "admin_token": os.environ.get(tokens.VARIABLE, ""),
        "token_file": tokens.token_file(state),
    }
    if settings.target == "embedded":
        target = EmbeddedTarget(settings.url, **known)
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
    vllm = VllmTarget(settings.url, **known)
    if first is None:
        if not vllm.is_up():
            raise TargetError(f"{settings.url}: nobody answers; a vLLM server is started by a publication")
        return vllm
    launch = VllmLaunch(
        python=Path(settings.vllm_python),
        model=base.path,
        bundle=first,
        log=state / "vllm.log",
        pid_file=state / "vllm.pid",
        timeout=settings.start_timeout_s,
        options=("--max-num-seqs", str(settings.max_batch), *settings.vllm_options),
    )
    if vllm.start(launch):
        vllm.rollback("")  # it is active from the start there, and has to pass its canaries first
    return vllm
