"""Stage: a new user joins a published fleet: a core is trained in its basis, judged, stored, published.

The user's text is read here and nowhere else. Everybody else's bytes in the bundle stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from soppu.compress import Bundle, joining
from soppu.errors import BundleError
from soppu.evaluate.losses import UserLosses
from soppu.progress import followed, telling
from soppu.progress.telling import Tell
from soppu.stages import join_notes, join_rules
from soppu.stages.federate import shared_adapter
from soppu.stages.join_admit import Judged, admit
from soppu.stages.join_collect import collect_held
from soppu.stages.join_ground import Ground, text_of
from soppu.stages.join_live import live_bundle
from soppu.stages.joined import At, Joined, Newcomer
from soppu.stages.published import stage_name as publication
from soppu.stages.run import open_run
from soppu.stages.targets import open_target, running_target, target_settings

__all__ = ["Joined", "Newcomer", "as_run", "join", "stage_name"]


def stage_name(user: str) -> str:
    """What a join is called among the stages of a run."""
    return f"join {user}"


def join(run_folder: str, newcomer: Newcomer, *, on_progress: Tell | None = None) -> Joined:
    """Train a user's core in the basis of a run's bundle, and serve it. Returns what came of it.

    The bundle is what the run serves at the target, or else, where nothing is live there, what it evaluated
    last. Of several joins at once each trains by itself; they store and publish one after the other. Beside
    the training it costs O(bundle), read twice and written once. Asked again with the same text for a user
    who has joined by it, it trains nothing: an attempt that was killed goes on where it was.

    Raises:
        ConfigError: the run has no bundle yet, or `own_rank` is out of its range.
        BundleError: the user is in the bundle already, its users share no basis, another run's is live, or
            one with other bases went live meanwhile.
        DataError: the user's id is none, or the text cannot be read, or is too little.
        GateError: on held-out text the core is worse than the shared adapter or the base model, or breaks
            a rule of the run's gate, or the gate has refused the bundle, or has a rule on arms that one user
            has no figure of; nothing was stored or published.
        TargetError: the server refused; what was published before goes on being served.
    """
    newcomer.check()
    run = open_run(run_folder)
    settings = target_settings(run, newcomer.target)
    with telling.stage(run.folder, stage_name(newcomer.user), on_progress=on_progress) as tell:
        at = At(run, settings, tell)
        joined = _join(at, newcomer)
        tell({"note": "asking for the first token", "share": 0.95})
        with joined.clock("first token"):
            _first_token(at, joined)
        found = {name: getattr(joined, name) for name in ("url", "first_token", "seconds")}
        run.write(joined.file, run.read(joined.file) | found)
        tell({"note": f"{newcomer.user} is served", "share": 1.0})
    return joined


@contextmanager
def as_run(run_folder: str, newcomer: Newcomer, *, of: str = "") -> Iterator[None]:
    """Have watchers of the run's folder see a join, for a process that does nothing else there.

    Where a run is under way in the folder they go on seeing that.

    Args:
        of: who asked for it, such as the id of Prefect's flow run.
    """
    run = open_run(run_folder)
    label = target_settings(run, newcomer.target).label
    if followed.under_way(run.folder):
        yield
        return
    telling.begin(run.folder, (stage_name(newcomer.user), publication(label)), of=of)
    with telling.ending(run.folder):
        yield


def _join(at: At, newcomer: Newcomer) -> Joined:
    run = at.run
    shared = shared_adapter(run)
    rules = join_rules.heard(run.config, shared=shared is not None, waive=newcomer.waive_rules)
    joined = Joined(newcomer.user, rules=rules, own_rank=newcomer.own_rank)
    with joined.clock("text and bundle"):
        if server := running_target(run, at.settings):
            with run.registry().publishing(at.settings.url):
                collect_held(run, at.settings, server)  # what is live is what joins there made of it
        before_id, before = live_bundle(at)
        if newcomer.user in before.users:
            return _again(at, newcomer, (before_id, before))
        bases = joining.bases_of(before)
        text = text_of(run.config, newcomer)
    joined.text = text.digest()
    at.tell({"note": "loading the base model", "share": 0.05})
    with joined.clock("base model"):
        ground = Ground.of(run, text, bases, shared=shared)
    placed = ground.core(joined, bases, tell=at.tell)
    with joined.clock("check"):
        made = joining.join(before, newcomer.user, placed, cluster=joined.cluster)
        stored = made.bundle.reconstruct(newcomer.user)
        losses, verdict = ground.judged(placed.to_lora(), stored, error=made.error, rules=rules)
    joined.measured(losses)
    verdict.raise_if_refused()
    with run.registry().publishing(at.settings.url):  # nothing goes live between the look and the switch
        admit(at, Judged(placed, before_id, made, losses, verdict), joined)
    return joined


def _again(at: At, newcomer: Newcomer, there: tuple[str, Bundle]) -> Joined:
    """What an earlier join by the same text came to, for a user who is in the bundle. BundleError."""
    bundle_id, bundle = there
    user, run = newcomer.user, at.run
    held = bundle.adapter_ids[bundle.index(user)]
    text = text_of(run.config, newcomer).digest()
    told = join_notes.earlier(run, user, text=text, own_rank=newcomer.own_rank, held=held)
    if told is None:
        raise BundleError(f"user {user!r} is in bundle {bundle_id[:12]} already: they are served")
    kept = {one.name: told[one.name] for one in fields(Joined) if one.name in told.keys() - {"losses"}}
    joined = Joined(**kept | {"bundle_id": bundle_id, "url": at.settings.url, "again": True})
    joined.measured(UserLosses.from_dict(told["losses"][0]))
    return joined


def _first_token(at: At, joined: Joined) -> None:
    target = open_target(at.run, at.settings)
    asked_as = target.placements(joined.bundle_id).get(joined.user, joined.user)
    joined.first_token = target.complete(at.settings.canary_prompt, user=asked_as, max_new_tokens=1)
