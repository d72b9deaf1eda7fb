"""Which bundle a newcomer joins: what their run serves at a target, or would."""

from __future__ import annotations

from soppu.compress import Bundle
from soppu.errors import BundleError, ConfigError, GateError
from soppu.evaluate.gate import Verdict
from soppu.stages.history import refuse_forgotten
from soppu.stages.joined import At
from soppu.stages.run import Run
from soppu.stages.tradeoff.judge import unheard


def live_bundle(at: At) -> tuple[str, Bundle]:
    """What the run serves there, or would; refused if somebody in it was forgotten."""
    registry = at.run.registry()
    bundle_id = live_of(at) or _evaluated(at.run)
    refuse_forgotten(registry, bundle_id)
    return bundle_id, Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)


def live_of(at: At) -> str:
    """What is live at the target, "" for nothing. BundleError if it is another run's."""
    run, registry, url = at.run, at.run.registry(), at.settings.url
    live = registry.live(url)
    if not live or (owner := registry.bundle(live).run) == run.id:
        return live
    newest = run.newest_evaluation()
    if newest and run.read(newest)["bundle_id"] == live:  # two runs have come to the same bytes
        return live
    raise BundleError(
        f"{url} serves bundle {live[:12]} of run {owner!r}, not of {run.id!r}: a join here would take it from"
        " its users; name that run, or publish a bundle of this one first"
    )


def _evaluated(run: Run) -> str:
    """What the run evaluated last. ConfigError if there is none, GateError if it was not to be published."""
    newest = run.newest_evaluation()
    if not newest:
        raise ConfigError(f"{run.folder}: the run has no bundle yet; let `soppu run` come to its end")
    told = run.read(newest)
    Verdict.from_dict(told["verdict"]).raise_if_refused()
    if rules := unheard(run, newest):
        raise GateError(rules)
    return str(told["bundle_id"])
