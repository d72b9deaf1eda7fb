"""Cross-validation: what each policy would have chosen for prompts that it was not fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from soppu.errors import RouterError
from soppu.serve.router.measured import Ints, Measured
from soppu.serve.router.policies import ORACLE, Options, choose, fit, names

FOLDS = 5


def folds(digests: Sequence[str], *, count: int, seed: int) -> Ints:
    """(n,) the fold of every prompt: equal prompts are in one fold, whoever asked.

    Different prompts are dealt out in the order of hashes, so folds are of one size, and of two none has all.
    """
    order = sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    fold = {digest: place % count for place, digest in enumerate(order)}
    return np.array([fold[digest] for digest in digests], dtype=np.int64)


def choices(measured: Measured, options: Options, *, count: int = FOLDS, seed: int = 0) -> dict[str, Ints]:
    """Policy -> (n,) arms chosen, each prompt judged by policies fitted on the other folds; and the oracle's.

    A prior of `options` is left out: it was measured on prompts that are judged here. RouterError where all
    prompts are one: nothing else is left to fit on.
    """
    if len(set(measured.digests)) < 2:
        raise RouterError(f"{len(measured)} prompts, of them different: 1, needed: 2 and more")
    blind = replace(options, prior={})
    there = names([arm.name for arm in options.arms])
    found = {name: np.zeros(len(measured), dtype=np.int64) for name in there}
    fold = folds(measured.digests, count=count, seed=seed)
    for number in np.unique(fold):
        judged, seen = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        for name, chosen in found.items():
            policy = fit(name, measured.at(seen), blind)
            chosen[judged] = choose(policy.expect(measured.asked.at(judged)), blind)
    return {**found, ORACLE: measured.losses.argmin(1)}
