"""Stage: users who joined at a server itself come into the registry, and into its record of what is live.

The server keeps a join until it is told that a registry has it, so nobody is lost by a restart of either.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from soppu.compress import Bundle, joining
from soppu.config import TargetConfig
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.errors import RegistryError, TargetError
from soppu.progress import telling
from soppu.registry import Registry
from soppu.serve.api.answers import KeptJoin
from soppu.stages import join_notes
from soppu.stages.published import target_names
from soppu.stages.run import Run, open_run
from soppu.stages.targets import running_target, target_settings
from soppu.targets import joins
from soppu.targets.http import HttpTarget

STAGE = "collect joins"
_LOG = logging.getLogger(__name__)


def collect_joins(run_folder: str, target: str = "") -> list[str]:
    """Take over who joined at a target of a run, by default at the first; their ids, in order.

    Everybody's core is stored as their current adapter. Where what is live there is what they joined, the
    registry makes the same bundle of it, and records that as live. Nobody where no server answers.
    O(joins x bundle).

    Raises:
        TargetError: the server serves what the registry does not know, or makes other bundles than it.
        AdapterError, RegistryError, StorageError: a core is damaged, or cannot be stored.
    """
    run = open_run(run_folder)
    settings = target_settings(run, target)
    found = running_target(run, settings)
    if found is None:
        return []
    with telling.stage(run.folder, STAGE) as tell, run.registry().publishing(settings.url):
        users = collect_held(run, settings, found)
        tell({"note": f"{len(users)} joined at {settings.url}", "share": 1.0})
    return users


def collect_everywhere(run_folder: str) -> list[str]:
    """As `collect_joins` at each target of a run, before a set is frozen; their ids.

    A server that cannot be asked ends no run: a publication to it is refused while it keeps joins.
    """
    users = []
    for name in target_names(run_folder):
        try:
            users += collect_joins(run_folder, name)
        except TargetError as error:
            _LOG.warning("nobody is taken over from %s: %s", name, error)
    return users


def collect_held(run: Run, settings: TargetConfig, target: HttpTarget) -> list[str]:
    """As `collect_joins`, for who holds the right to publish there."""
    active, kept = target.active(), joins.kept(target)
    made = _Made(run.registry(), target.url)
    known = [join for join in kept if made.add(join, joins.core_of(target, join))]
    for bundle_id in {join.bundle_id for join in kept} - {join.before for join in kept}:
        made.store(bundle_id)
    _record(made, settings, kept, active=active)
    for join in known:
        if made.owner(join.before) == run.id:  # another run's report is that run's affair
            run.write(join_notes.file_of(join.user, join.core_id), join.model_dump())
    for join in reversed(kept):  # one that is left builds on those before it
        joins.forget(target, join)
    return [join.user for join in known]


@dataclass
class _Made:
    """Bundles as the joins made them, one from the other, beside those that the registry has."""

    registry: Registry
    url: str
    bundles: dict[str, tuple[Bundle, dict[str, str]]] = field(default_factory=dict)  # and who holds what
    roots: dict[str, str] = field(default_factory=dict)  # bundle -> the one of the registry it came of
    spoilt: set[str] = field(default_factory=set)  # with a user who was forgotten since

    def add(self, join: KeptJoin, core: CoreAdapter) -> bool:
        """Store a user's adapter, and make the bundle that they joined; not of one who was forgotten since.

        TargetError as `collect_joins`.
        """
        before, members = self._of(join.before, join.user)
        placed = CoreInBasis(core, joining.basis_of(before, join.cluster), who=join.user)
        run, own = self.owner(join.before), ""
        if gone := self.registry.forgotten_at(join.user) > join.at:
            _LOG.warning("%s joined at %s and was forgotten since: not taken over", join.user, self.url)
        else:
            self.registry.put_basis(placed.basis)
            own = self.registry.put_adapter(core, user=join.user, run=run, metrics=join.metrics)
        if gone or join.before in self.spoilt:
            self.spoilt.add(join.bundle_id)
        bundle = joining.put(before, join.user, placed, cluster=join.cluster).bundle
        found = hashlib.sha256(bundle.to_bytes()).hexdigest()
        if found != join.bundle_id:
            raise TargetError(
                f"{self.url}: {join.user!r} joined as bundle {join.bundle_id[:12]}, the same makes"
                f" {found[:12]} here: the server is of another version of SOPPU"
            )
        self.bundles[found] = bundle, members | {join.user: own}
        self.roots[found] = self.roots.get(join.before, join.before)
        return not gone

    def store(self, bundle_id: str) -> None:
        """Have the registry keep a bundle, unless a user of it was forgotten."""
        if bundle_id in self.spoilt:
            return
        bundle, members = self.bundles[bundle_id]
        set_id = self.registry.freeze({user: members[user] for user in bundle.users})
        self.registry.put_bundle(bundle.to_bytes(), set_id=set_id, run=self.owner(bundle_id))

    def owner(self, bundle_id: str) -> str:
        """The run that a bundle came of."""
        return self.registry.bundle(self.roots.get(bundle_id, bundle_id)).run

    def _of(self, bundle_id: str, user: str) -> tuple[Bundle, dict[str, str]]:
        if bundle_id in self.bundles:
            return self.bundles[bundle_id]
        try:
            row = self.registry.bundle(bundle_id)
        except RegistryError as error:
            raise TargetError(
                f"{self.url}: {user!r} joined bundle {bundle_id[:12]}, unknown to this registry: {error}"
            ) from None
        if row.contains_forgotten:
            self.spoilt.add(bundle_id)
        bundle = Bundle.load(self.registry.bundle_path(bundle_id), expected_hash=bundle_id)
        return bundle, self.registry.get_set(row.set_id)


def _record(made: _Made, settings: TargetConfig, kept: Sequence[KeptJoin], *, active: str) -> None:
    """Note what is live now, where joins led there from what was; another may be active by hand."""
    registry = made.registry
    live = before = registry.live(settings.url)
    for join in kept:
        live = join.bundle_id if join.before == live else live
    newer = active not in {before, live} | {join.before for join in kept}  # of a join that came meanwhile
    if live != before and live not in made.spoilt and (active == live or newer):
        registry.record_publication(target=settings.target, url=settings.url, bundle_id=live)
