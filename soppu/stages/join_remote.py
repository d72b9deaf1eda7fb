"""Stage: a user joins at a server, from a machine that has neither the run nor its registry.

The text stays where it is: the basis comes from the server, and a core goes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from soppu import adapter as adapters
from soppu.config import Config
from soppu.cores import folder as core_folder
from soppu.cores.core import CoreInBasis
from soppu.errors import TargetError
from soppu.progress.telling import Tell
from soppu.stages import join_rules
from soppu.stages.join_ground import Ground, text_of
from soppu.stages.joined import FOLDER, Joined, Newcomer
from soppu.stages.run import Run
from soppu.targets import joins
from soppu.targets.http import HttpTarget
from soppu.targets.joins import LiveBasis


@dataclass(frozen=True)
class Elsewhere:
    """Where a client joins, and with what it trains."""

    target: HttpTarget
    config: Config  # base model, text, training and gate as the fleet has them
    folder: Path  # of the client: its cores, and what became of them
    shared: Path | None = None  # PEFT folder of the adapter that the fleet shares, to begin at
    replace: bool = False  # whether the core may take the place of one that the user has there


def join_remote(newcomer: Newcomer, where: Elsewhere, *, on_progress: Tell) -> Joined:
    """Train a user's core in the basis that a server serves, judge it here, and send it. What came of it.

    Raises:
        ConfigError: `own_rank` out of its range.
        DataError: the user's id is none, or the text cannot be read, or is too little.
        GateError: on held-out text the core is worse than the shared adapter or the base model; nothing was
            sent.
        TargetError: nobody answers, or the server serves another base model, or refused the core.
    """
    newcomer.check()
    run = Run(where.folder, where.config)
    shared = adapters.read(where.shared) if where.shared else None
    rules = join_rules.heard(run.config, shared=shared is not None, waive=newcomer.waive_rules)
    joined = Joined(newcomer.user, rules=rules, own_rank=newcomer.own_rank)
    with joined.clock("text and basis"):
        text = text_of(run.config, newcomer)
        found = _bases(where.target)
    joined.text = text.digest()
    bases = [one.basis for one in found]
    on_progress({"note": "loading the base model", "share": 0.05})
    with joined.clock("base model"):
        ground = Ground.of(run, text, bases, shared=shared)
    placed = ground.core(joined, bases, tell=on_progress)
    with joined.clock("check"):
        lora = placed.to_lora()
        losses, verdict = ground.judged(lora, lora, error=0.0, rules=rules)
    joined.measured(losses)
    verdict.raise_if_refused()
    on_progress({"note": f"sending the core to {where.target.url}", "share": 0.8})
    with joined.clock("upload and row"):
        _send(joined, placed, where)
    with joined.clock("first token"):
        _first_token(joined, where)
    run.write(joined.file, asdict(joined) | {"losses": [losses.to_dict()], "verdict": verdict.to_dict()})
    on_progress({"note": f"{newcomer.user} is served", "share": 1.0})
    return joined


def _bases(target: HttpTarget) -> Sequence[LiveBasis]:
    """Every basis of the bundle that is live at a server. TargetError: none is, or nobody answers."""
    if not target.is_up():
        raise TargetError(f"{target.url}: nobody answers there")
    first = joins.live_basis(target)
    found = [first, *(joins.live_basis(target, cluster=number) for number in range(1, first.clusters))]
    if any(one.bundle_id != first.bundle_id for one in found):
        raise TargetError(f"{target.url}: another bundle went live meanwhile; start again")
    return found


def _send(joined: Joined, placed: CoreInBasis, where: Elsewhere) -> None:
    """Keep the core here, and have the server add it."""
    folder = where.folder / FOLDER / placed.core.id
    core_folder.write(placed.core, folder)
    told = joins.send(where.target, joined.user, folder, replace=where.replace, metrics=joined.metrics())
    for name in ("core_id", "basis_id", "adapter_id", "bundle_id", "before"):
        setattr(joined, name, getattr(told, name))
    joined.url = where.target.url


def _first_token(joined: Joined, where: Elsewhere) -> None:
    """TargetError where the user does not answer as themselves."""
    prompt = where.config.serve.canary_prompt
    version = f"{joined.user}@{joined.bundle_id}"
    (why,) = where.target.canary([joined.user], prompt, bundle_id=joined.bundle_id)
    if why:
        raise TargetError(f"{where.target.url}: {version} was added, and its canary failed: {why}")
    joined.first_token = where.target.complete(prompt, user=joined.user, max_new_tokens=1)
