"""Stage: push a bundle that passed the gate to one serving target, try every user, switch over."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from soppu.compress import Bundle
from soppu.config import TargetConfig
from soppu.errors import GateError, TargetError
from soppu.evaluate.gate import Verdict
from soppu.progress import telling
from soppu.registry import Registry
from soppu.serve.api.answers import KeptJoin
from soppu.serve.bank.from_bundle import unchanged
from soppu.stages.expected import expected_traces
from soppu.stages.history import kept, refuse_forgotten
from soppu.stages.published import Published, serving_file, stage_name
from soppu.stages.run import Run, open_run
from soppu.stages.targets import open_target, target_settings
from soppu.stages.tradeoff.judge import unheard
from soppu.targets import joins
from soppu.targets.http import HttpTarget

_LOG = logging.getLogger(__name__)
SAMPLES = 64  # users whose sample completion goes into the report; and who are asked beside those changed


@dataclass(frozen=True)
class Held:
    """What is known to who holds the right to publish at a URL (`Registry.publishing`).

    Attributes:
        changed: the only users whose bytes are not those of the bundle that is live there; they are asked,
            and at most `SAMPLES` of the others, evenly spread. Where it is empty everybody is.
    """

    changed: Collection[str] = ()


def publish(
    run_folder: str,
    bundle_id: str,
    evaluation: str,
    target: str = "",
    *,
    held: Held | None = None,
) -> str:
    """Publish a bundle to one target, by default the first; returns the URL it is served at.

    Staged first, asked one canary a user, switched to only when all of them answered. Until then, and if
    anything fails, what was published before goes on being served. One publication to a server at a time.

    Args:
        held: given by who holds the right to publish there; by default it is waited for.

    Raises:
        GateError: the evaluation's verdict was no; carries every reason.
        TargetError: the server refused, is not there, a canary failed, or a user of the bundle has been
            forgotten meanwhile.
    """
    run = open_run(run_folder)
    settings = target_settings(run, target)
    with telling.stage(run.folder, stage_name(settings.label)) as tell:
        try:
            Verdict.from_dict(run.read(evaluation)["verdict"]).raise_if_refused()
            if rules := unheard(run, evaluation):
                raise GateError(rules)
            with nullcontext() if held else run.registry().publishing(settings.url):
                return _publish(run, settings, bundle_id, tell, changed=held.changed if held else ())
        except GateError:
            raise
        except Exception as error:  # of any kind: the report has a row for it
            _note(run, settings, bundle_id, error=str(error))
            raise


def _publish(
    run: Run, settings: TargetConfig, bundle_id: str, tell: telling.Tell, *, changed: Collection[str]
) -> str:
    registry, started = run.registry(), time.monotonic()
    refuse_forgotten(registry, bundle_id)
    path = registry.bundle_path(bundle_id)
    tell({"note": f"opening {settings.url}", "share": 0.0})
    target = open_target(run, settings, first=path)
    active = target.active()
    _refuse_over(joins.kept(target), target.url, run)
    _warn_of_lost(registry, settings.url, bundle_id)
    bundle = Bundle.load(path, expected_hash=bundle_id)
    tell({"note": f"handing over {len(bundle.users)} users", "share": 0.3})
    target.publish(path, bundle_id=bundle_id)
    staged = time.monotonic()
    try:
        asked = asked_of(bundle.users, changed)
        tell({"note": f"asking for {len(asked)} of {len(bundle.users)} users once", "share": 0.5})
        _ask_canaries(run, settings, target, (bundle_id, bundle), users=asked)
        refuse_forgotten(registry, bundle_id)
    except TargetError:
        if bundle_id != target.active():
            target.drop(bundle_id)
        raise
    placements, known = target.placements(bundle_id), _completions(run, settings) if changed else {}
    target.activate(bundle_id, instead_of=active)
    registry.record_publication(
        target=settings.target, url=settings.url, bundle_id=bundle_id, placements=placements
    )
    for other in set(target.bundles()) - kept(registry, settings, bundle_id):
        target.drop(other)
    took = {"push_s": staged - started, "canaries_s": time.monotonic() - staged}
    shown = tuple(dict.fromkeys((*changed, *bundle.users)))[:SAMPLES]
    told: dict[str, Any] = {
        "canaries": dict.fromkeys(asked, ""),
        "prompt": settings.canary_prompt,
        "completions": {},
        "asked_as": {user: placements[user] for user in shown if user in placements},
    }
    _note(run, settings, bundle_id, users=len(bundle.users), told=told, **took)
    new = [user for user in shown if user in changed or user not in known]
    tell({"note": f"live; one completion for each of {len(new)}", "share": 0.8})
    made = {
        user: target.complete(
            settings.canary_prompt,
            user=placements.get(user, user),
            max_new_tokens=settings.completion_tokens,
        )
        for user in new
    }
    told["completions"] = {user: made[user] if user in made else known[user] for user in shown}
    _note(run, settings, bundle_id, users=len(bundle.users), told=told, **took)
    return settings.url


def _refuse_over(kept: Sequence[KeptJoin], url: str, run: Run) -> None:
    """TargetError where users joined at the server whom no registry has: their service would end."""
    if kept:
        raise TargetError(
            f"{url}: {len(kept)} users joined there and are in no registry yet, {kept[0].user!r} among them;"
            f" `soppu admit --run {run.folder}` takes them over, then compress again"
        )


def _warn_of_lost(registry: Registry, url: str, bundle_id: str) -> None:
    """Say who has joined since the set of this bundle was frozen: until it is compressed again they wait."""
    live = registry.live(url)
    if not live:
        return
    new, old = (registry.get_set(registry.bundle(one).set_id) for one in (bundle_id, live))
    held = registry.current_set()
    if lost := [user for user in old if user not in new and user in held]:
        _LOG.warning(
            "%d users are served at %s and not in bundle %s, %s among them: they came after its set was"
            " frozen, and the next recompression has them",
            len(lost),
            url,
            bundle_id[:12],
            lost[0],
        )


def _completions(run: Run, settings: TargetConfig) -> Mapping[str, str]:
    """What users of the bundle that is live there were heard to say, {} where that is not known."""
    row = run.read(serving_file(settings.label))
    same = row.get("bundle_id") == run.registry().live(settings.url) and not row.get("error")
    return dict(row.get("completions", {})) if same else {}


def _note(
    run: Run, settings: TargetConfig, bundle_id: str, *, told: dict[str, Any] | None = None, **values: Any
) -> None:
    form = "adapters" if settings.pushes_adapters else "bundle"
    row = Published(settings.label, settings.target, form, settings.url, bundle_id, **values)
    run.write(serving_file(settings.label), asdict(row) | (told or {}))


def asked_of(users: Sequence[str], changed: Collection[str]) -> tuple[str, ...]:
    """Whom a canary is asked of: those `changed` and some of the others; everybody by default."""
    others = [user for user in users if user not in changed] if changed else users
    step = -(-len(others) // SAMPLES) if changed else 1
    return (*changed, *others[:: max(step, 1)])


def _ask_canaries(
    run: Run,
    settings: TargetConfig,
    target: HttpTarget,
    staged: tuple[str, Bundle],
    *,
    users: Sequence[str],
) -> None:
    """One answer with each of these users' adapters in the staged bundle. TargetError names who failed."""
    bundle_id, bundle = staged
    compared = users[: settings.canary_compared] if settings.pushes_adapters else ()
    asked = {"prompt": settings.canary_prompt, "tokens": settings.canary_tokens}
    faults = target.canary(
        users,
        settings.canary_prompt,
        bundle_id=bundle_id,
        zero_users=unchanged(bundle),
        expected=expected_traces(run.base(), bundle, compared, **asked),  # type: ignore[arg-type]
        max_new_tokens=settings.canary_tokens,
        workers=settings.max_batch,
    )
    if failed := [f"{user}: {why}" for user, why in zip(users, faults, strict=True) if why]:
        raise TargetError(f"bundle {bundle_id[:12]} stays unpublished, canaries failed: {'; '.join(failed)}")
