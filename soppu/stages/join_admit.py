"""From a core that was judged to a row that is served: stored, and published, under the right to publish."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from soppu.compress import joining
from soppu.cores.core import CoreInBasis
from soppu.errors import BundleError
from soppu.evaluate.gate import Verdict
from soppu.evaluate.losses import UserLosses
from soppu.stages.join_collect import collect_held
from soppu.stages.join_live import live_bundle
from soppu.stages.joined import At, Joined
from soppu.stages.publish import Held, publish
from soppu.stages.published import serving_file
from soppu.stages.targets import running_target
from soppu.stages.tradeoff.judge import RULES


@dataclass(frozen=True)
class Judged:
    """A core that may be stored, and the bundle that it was judged as a row of."""

    placed: CoreInBasis
    before_id: str
    made: joining.Joined
    losses: UserLosses
    verdict: Verdict


def admit(at: At, judged: Judged, joined: Joined) -> None:
    """Store the core as a row of what is live now, and publish that; the right to publish is held."""
    run, registry, user = at.run, at.run.registry(), joined.user
    if server := running_target(run, at.settings):
        collect_held(run, at.settings, server)  # who joined there meanwhile
    placed, made = judged.placed, _on_what_is_live(at, judged, joined)
    joined.core_id, joined.basis_id, joined.added = placed.core.id, placed.basis.id, made.added
    live = registry.live(at.settings.url)
    with joined.clock("store"):
        registry.put_basis(placed.basis)
        own = registry.put_adapter(placed.core, user=user, run=run.id)
        members = registry.get_set(registry.bundle(joined.before).set_id)
        set_id = registry.freeze({one: members.get(one, own) for one in made.bundle.users})
        joined.bundle_id = registry.put_bundle(made.bundle.to_bytes(), set_id=set_id, run=run.id)
    joined.adapter_id = own
    told: dict[str, Any] = asdict(joined) | {RULES: joined.rules, "set_id": set_id}
    told |= {"losses": [judged.losses.to_dict()], "verdict": judged.verdict.to_dict()}
    run.write(joined.file, told)
    at.tell({"note": f"publishing to {at.settings.url}", "share": 0.7})
    with joined.clock("publication"):
        how = Held((user,) if live else ())  # else nobody has been asked there yet
        joined.url = publish(str(run.folder), joined.bundle_id, joined.file, at.settings.label, held=how)
    row, whole = run.read(serving_file(at.settings.label)), joined.seconds.pop("publication")
    took = {"push": row["push_s"], "canaries": row["canaries_s"]}
    joined.seconds |= took | {"sample completion": whole - sum(took.values())}


def _on_what_is_live(at: At, judged: Judged, joined: Joined) -> joining.Joined:
    """The row that was judged, in the bundle that is live now: others may have joined meanwhile.

    BundleError: the user is in that, or it has other bases.
    """
    joined.before, before = live_bundle(at)
    if joined.before == judged.before_id:
        return judged.made
    if joined.user in before.users:
        raise BundleError(f"user {joined.user!r} is in bundle {joined.before[:12]} already: they are served")
    bases = joining.bases_of(before)
    same = [number for number, basis in enumerate(bases) if basis.id == judged.placed.basis.id]
    if not same:
        raise BundleError(
            f"bundle {joined.before[:12]} went live at {at.settings.url} meanwhile, with other bases than the"
            f" core's {judged.placed.basis.id}; join that: start again"
        )
    joined.cluster = same[0]
    return joining.join(before, joined.user, judged.placed, cluster=same[0])
