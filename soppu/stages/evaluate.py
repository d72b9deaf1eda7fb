"""Stage: every user's held-out loss four ways, and the gate's verdict on them.

Numbers come from a `Measure`. The one here reads held-out text in the process that evaluates: in a simulation
that is the same machine; where users' text may not leave their side, name a source of consented held-out
text, and who is not in it is judged by the error of their adapter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from soppu.compress import Bundle
from soppu.evaluate.gate import check
from soppu.evaluate.losses import CURRENT, UserLosses
from soppu.federation.personalise import BASE
from soppu.module_names import lowest_layer
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages import elsewhere
from soppu.stages.bench import Bench, with_text
from soppu.stages.federate import RESULT, shared_adapter
from soppu.stages.refit import judged
from soppu.stages.run import Run, open_run

HERE = "on the full model, here"


class Measure(Protocol):
    """A source of losses: of those among `members` (user -> adapter id) whose text it can have read."""

    def __call__(
        self, run: Run, members: Mapping[str, str], bundle_id: str, *, on_progress: Tell | None = None
    ) -> list[UserLosses]:
        """One entry a user measured; the gate lists the others."""
        ...


def evaluate(run_folder: str, set_id: str, bundle_id: str, *, on_progress: Tell | None = None) -> str:
    """Measure, judge, and write both down; returns the name of the file in the run folder."""
    run = open_run(run_folder)
    with telling.stage(run.folder, "evaluate", on_progress=on_progress) as tell:
        return _evaluate(run, set_id, bundle_id, tell)


def _evaluate(run: Run, set_id: str, bundle_id: str, tell: Tell) -> str:
    # named before text is read: were it changed meanwhile, the name would belong to the text before
    name = f"evaluation-{bundle_id[:16]}-{run.inputs('evaluate')}.json"
    registry = run.registry()
    members = registry.get_set(set_id)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    losses = source_of(run)(run, members, bundle_id, on_progress=tell)
    refit = judged(run, members)
    verdict = check(losses, bundle.report.relative_error, options=run.config.gate, seed=run.config.seed)
    run.write(
        name,
        {
            "bundle_id": bundle_id,
            "set_id": set_id,
            "adapters": members,
            "measured": elsewhere.WHERE if run.config.federation.connection else HERE,
            "losses": [item.to_dict() for item in losses],
            "verdict": verdict.to_dict(),
            "basis": refit and refit.to_dict(),
        },
    )
    return name


def source_of(run: Run) -> Measure:
    """Who measures for a run: the nodes of its connection, or this process, on the full model."""
    return elsewhere.measure if run.config.federation.connection else measure


def measure(
    run: Run, members: Mapping[str, str], bundle_id: str, *, on_progress: Tell | None = None
) -> list[UserLosses]:
    """Losses on the full model, of everybody whose text is at hand: of the set, and of the run's federation.

    Users of the federation who are served the base model are in no set; they are measured all the same.
    Without a federation a user's own adapter is the current one, and nothing is shared.
    """
    registry, result, shared = run.registry(), run.read(RESULT), shared_adapter(run)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    bench = Bench(run, layers=lowest_layer(bundle.shapes))
    own, served = {**members, **result.get("adapters", {})}, result.get("served", {})
    losses = []
    here = with_text(run.config, own)
    for number, (user, text) in enumerate(here.items(), start=1):
        what = served.get(user, CURRENT)
        tried = {
            "personal": registry.get_adapter(own[user]),
            "shared": shared,
            "compressed": None if what == BASE else bundle.reconstruct(user),
        }
        losses.append(bench.losses(text, tried, served=what))
        if on_progress:
            on_progress({"note": f"evaluated {user}", "share": number / len(here), "user": user})
    return losses
