"""Whether the basis in force is due for a refit: its probes are found in the registry, and measured.

A probe is the newest adapter that a user trained freely since the basis is in force: who trains one beside
their core, as a few should, makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from soppu.cores.core import is_core
from soppu.cores.projecting import from_lora
from soppu.evaluate.refit import Probe, Refit, decide
from soppu.module_names import lowest_layer
from soppu.registry import Registry
from soppu.stages import grow
from soppu.stages.bench import Bench, with_text
from soppu.stages.federate import shared_adapter
from soppu.stages.run import Run


def judged(run: Run, members: Mapping[str, str]) -> Refit | None:
    """What the probes say of the basis in force, for users (user -> adapter id) some of whom are cores.

    None where no basis is in force, or nobody is a core. The newest `basis.probe_users` at most are measured,
    on the text that is at hand here: O(their text) on the full model. Where text is on nodes of its own the
    errors alone are told.

    Raises:
        RegistryError: a probe, a core or the basis is damaged.
    """
    registry, settings = run.registry(), run.config.basis
    basis_id = registry.current_basis(run.base().base)
    if not basis_id or not any(map(is_core, members.values())):
        return None
    basis = registry.get_basis(basis_id)
    probes = [
        Probe(user, held, from_lora(registry.get_adapter(held), basis, who=user).error)
        for user, held in run.probes().items()
    ]
    found = decide(basis_id, _measured(run, probes, members), settings)
    return replace(found, grown_from=grow.grown_from(run, basis_id))


def _measured(run: Run, probes: list[Probe], members: Mapping[str, str]) -> list[Probe]:
    """The probes with the gains of adapter and core, where the user has a core, and text that is here."""
    cores = {one.user: members[one.user] for one in probes if is_core(members.get(one.user, ""))}
    here = {} if run.config.federation.connection else with_text(run.config, cores)
    if not here:
        return probes
    registry, shared = run.registry(), shared_adapter(run)
    bench = Bench(run, layers=_lowest(registry, [one.adapter_id for one in probes]))
    found = []
    for probe in probes:
        if probe.user not in here:
            found.append(probe)
            continue
        tried = {
            "without": shared,
            "probe": registry.get_adapter(probe.adapter_id),
            "core": registry.get_adapter(cores[probe.user]),
        }
        each = bench.measure(here[probe.user].heldout, tried)
        without, free, core = (each.mean(name) for name in tried)
        found.append(Probe(probe.user, probe.adapter_id, probe.error, without - free, without - core))
    return found


def _lowest(registry: Registry, adapter_ids: list[str]) -> int:
    """The lowest layer that any of these adapters changes."""
    return lowest_layer(name for held in adapter_ids for name in registry.get_adapter(held).pairs)
