"""Fitting a router on a finished run: prompts, what each arm makes of them, and which policy that speaks for.

Prompts are text that nobody's adapter was trained on: what is held out, then validation text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soppu import base_identity, user_ids
from soppu.base_identity import Base
from soppu.compress import Bundle
from soppu.errors import RouterError
from soppu.evaluate.losses import UserLosses
from soppu.federation.personalise import BASE as SERVED_BASE
from soppu.module_names import lowest_layer
from soppu.progress.telling import Tell
from soppu.serve.router import crossed, policies
from soppu.serve.router import file as files
from soppu.serve.router.file import RouterFile
from soppu.serve.router.measured import BASE, CHEAPER, PERSONAL, Arm
from soppu.serve.router.policies import NEIGHBOURS, TOLERANCE, Options
from soppu.stages import router_table
from soppu.stages.bench import Bench
from soppu.stages.router_measure import measure
from soppu.stages.run import Run, open_run

FILE = "router.json"


@dataclass(frozen=True)
class FitOptions:
    """What a fit is asked for; `policy` "" leaves the choice to cross-validation."""

    prompts: int = 48  # of a user, at most
    neighbours: int = NEIGHBOURS
    tolerance: float = TOLERANCE
    policy: str = ""
    cheaper: Path | None = None  # another bundle of the same users, as a third arm
    folds: int = crossed.FOLDS


def fit(
    run_folder: str, path: Path, options: FitOptions | None = None, *, on_progress: Tell | None = None
) -> RouterFile:
    """Measure, judge by cross-validation, and write the router; gives what was written.

    Cost: one forward of the lower layers over every prompt, and two of the upper ones for each arm.

    Raises:
        RouterError: the run has no evaluation, no user of its bundle has prompts here, the policy is none, or
            the other bundle is no cheaper form of these users' adapters. All but the second before any work.
        ConfigError, BundleError: the folder is none of a run, or a bundle is gone, damaged or another's.
    """
    options = options or FitOptions()
    run = open_run(run_folder)
    evaluation = newest_evaluation(run)
    bundle_id = str(evaluation["bundle_id"])
    bundle = Bundle.load(run.registry().bundle_path(bundle_id), expected_hash=bundle_id)
    forms = {PERSONAL: bundle}
    if options.cheaper:
        forms[CHEAPER] = _cheaper(options.cheaper, run, bundle)
    arms = _arms(forms, options)
    if options.policy:
        policies.known(options.policy, list(forms))
    layers = lowest_layer(name for form in forms.values() for name in form.shapes)
    bench = Bench(run, layers=layers)
    measured = measure(bench, forms, prompts=options.prompts, on_progress=on_progress)
    chosen = Options(arms, options.neighbours, options.tolerance, _prior(evaluation, bundle, arms))
    table = router_table.rows(measured, chosen, folds=options.folds, seed=run.config.seed)
    policy, why = router_table.verdict(table)
    base = run.base()
    found = RouterFile(
        base_name=base.name,
        base_hash=base.hash,
        bundle_id=bundle_id,
        run=run.id,
        layer=layers,
        prompt_tokens=run.config.data.max_tokens // 2,
        policy=options.policy or policy,
        why="asked for" if options.policy else why,
        prior_from=str(evaluation["name"]) if chosen.prior else "the prompts",
        options=chosen,
        measured=measured,
        table=tuple(table),
    )
    return dataclasses.replace(found, id=files.write(path, found))


def newest_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation that a run wrote last, with its `name`. RouterError where there is none."""
    name = run.newest_evaluation()
    if not name:
        raise RouterError(
            f"{run.folder}: holds no evaluation-*.json; a router is fitted on a run whose bundle was judged"
        )
    try:
        return {**run.read(name), "name": name}
    except ValueError as error:
        raise RouterError(f"{run.folder / name}: not JSON: {error}; evaluate the run again") from None


def _cheaper(path: Path, run: Run, bundle: Bundle) -> Bundle:
    """The bundle of the third arm. RouterError where it cannot be one."""
    found, base = Bundle.load(path), run.base()
    expected = Base(base.name, base.hash)
    base_identity.check(found.base, expected, who=str(path), whose="the run has", error=RouterError)
    if not set(found.users) & set(bundle.users):
        own = user_ids.some(bundle.users)
        raise RouterError(f"{path}: is of {user_ids.some(found.users)}, the run's bundle of {own}")
    if (size := _bytes(found)) >= (own_size := _bytes(bundle)):
        raise RouterError(
            f"{path}: {size:,.0f} bytes a user, the run's own bundle has {own_size:,.0f}: it is not cheaper;"
            " compress the same adapters to a higher ratio"
        )
    return found


def _bytes(bundle: Bundle) -> float:
    """Of a user's own numbers, which is all that they have alone, in the mean."""
    return sum(len(page.data) for page in bundle.pages) / len(bundle.users)


def _arms(forms: Mapping[str, Bundle], options: FitOptions) -> list[Arm]:
    """Base and what the bundles hold."""
    arms = [Arm(BASE, "", 0.0)]
    for name, bundle in forms.items():
        adapter = "{user}"
        if name == CHEAPER and options.cheaper:
            adapter = "{user}@" + hashlib.sha256(options.cheaper.read_bytes()).hexdigest()
        arms.append(Arm(name, adapter, _bytes(bundle)))
    return arms


def _prior(evaluation: Mapping[str, Any], bundle: Bundle, arms: Sequence[Arm]) -> dict[str, Sequence[float]]:
    """Nats a token of every user of the bundle that the run's own evaluation has; it knows two arms."""
    if len(arms) > 2:
        return {}
    losses = [UserLosses.from_dict(item) for item in evaluation["losses"]]
    there = set(bundle.users)
    return {
        item.user: (item.base, item.compressed)
        for item in losses
        if item.user in there and item.served != SERVED_BASE
    }
